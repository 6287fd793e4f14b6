"""2:4 products by NVIDIA's cuSPARSELt through PyTorch's primitives, called so that their silent traps cannot be met.

What the primitives do and do not (PyTorch 2.11 to 2.13):

- The sparse operand is the left one and packed: W ``[N, K]`` for ``Y = X W^T``.  The dense operand is ``X.t()``; it is
  taken for the transpose of a *contiguous* matrix, whatever its strides are, so X is made contiguous first.  With
  ``transpose_result=True`` the result is ``[M, N]`` in memory, not a view.
- Nobody checks that the sizes along K agree, nor that what is packed has the pattern: both are checked here, or follow
  from the storage.
- Some algorithm ids return wrong numbers, in some runs, or write nothing at all.  An id counts only after its result
  was near the dense one twice, on random numbers, into memory that had been filled with NaN; those that pass are timed,
  once for a device, library version, sizes and dtype, and the answer is kept in a file.
- Each call makes the library's descriptors and plan anew, some 50 to 200 microseconds on the host (reports of others;
  ``slope-compile tune`` shows what it is here).  A CUDA graph pays it once.  ``alpha`` is never given: it is read back.

**Packed operands.**  The Parameter holds values and the pattern is a buffer; a packed operand is derived from them
and is as large as both.  By default it is made for a call and freed after it (one kernel to expand, one to pack, and a
dense scratch): no second copy of the weights stays.  :class:`Packed` keeps one, for whoever asks for it, and follows
in-place updates of the values by copying them into place where that was seen to work on the device, else by packing
anew, in both cases at the same address, so that a captured graph stays valid.

Private names used, tested on torch 2.13 without a GPU by fakes: ``torch._cslt_compress``, ``torch._cslt_sparse_mm``,
``torch._C._cusparselt.mm_search``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import cpu_build, gpu_tuning, reference, triton_products
from slope_compile.kernels.masks import random_mask
from slope_compile.kernels.metadata import pack_mask
from slope_compile.log import log
from slope_compile.pattern import Pattern

DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 16
"""Of all three sizes."""
OLDEST = (8, 0)
TRIALS = 2
"""Right results that an algorithm id owes before it is timed."""
MAX_IDS = 128
"""Ids that are tried where the library does not say how many there are."""


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """How the library computes one product."""

    alg_id: int
    split_k: int = 1
    split_k_mode: int = -1


class Primitives:
    """PyTorch's; the tests put others in their place."""

    def version(self) -> int | None:
        """Of the library; None: it is not in this PyTorch."""
        lt = torch.backends.cusparselt
        return lt.version() if lt.is_available() else None

    def capability(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)

    def name(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)

    def compress(self, dense: Tensor) -> Tensor:
        return torch._cslt_compress(dense)

    def product(self, packed: Tensor, dense: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
        return torch._cslt_sparse_mm(
            packed, dense, bias=bias, transpose_result=True,
            alg_id=algorithm.alg_id, split_k=algorithm.split_k, split_k_mode=algorithm.split_k_mode,
        )  # fmt: skip

    def suggestion(self, packed: Tensor, dense: Tensor) -> tuple[int, int, int, int]:
        """The library's own pick: id, split_k, mode; and the number of ids."""
        binding: Any = torch._C._cusparselt
        alg_id, split_k, mode, count = binding.mm_search(packed, dense, None, None, None, True)
        return int(alg_id), int(split_k), int(mode), int(count)

    def capturing(self) -> bool:
        """Whether a CUDA graph is being recorded: nothing may be searched now."""
        return torch.cuda.is_current_stream_capturing()

    def seconds(self, call: Callable[[], object]) -> float:
        return gpu_tuning.gpu_seconds(call)

    def expand(self, values: Tensor, pattern: Tensor) -> Tensor:
        return triton_products.expand(values, pattern)


primitives = Primitives()


def missing(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> str | None:
    """Why ``Y [M, N] = X [M, K] W^T`` cannot be computed by the library; None: it can, by a verified algorithm."""
    if primitives.version() is None:
        return "this PyTorch was built without cuSPARSELt"
    if device.type != "cuda":
        return f"cuSPARSELt runs on CUDA devices, not on {device}"
    capability = primitives.capability(device)
    if capability < OLDEST:
        return f"its sparse tensor cores begin with compute capability {OLDEST}, {device} has {capability}"
    if dtype not in DTYPES:
        return f"cuSPARSELt multiplies bfloat16 and float16 here, not {dtype}"
    wrong = {name: size for name, size in (("M", M), ("N", N), ("K", K)) if size % MULTIPLE or not size}
    if wrong:
        return f"{wrong} must be positive multiples of {MULTIPLE}"
    return None if algorithm(device, dtype, M, N, K) is not None else "no algorithm of the library is right there"


def pack(values: Tensor, pattern: Tensor) -> Tensor:
    """The library's operand for W ``[N, K]`` of values ``[N, K / 2]``; what was pruned is zero by construction."""
    return primitives.compress(primitives.expand(values, pattern).contiguous())


def linear(x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None = None) -> Tensor:
    """``Y [M, N] = X W^T + bias`` on an operand packed for this call: x ``[M, K]`` -> contiguous ``[M, N]``.

    Raises:
        ValueError: the library cannot compute it (see :func:`missing`), or the features of x and W differ.
    """
    N, K = values.shape[0], values.shape[1] * 2
    why = missing(x.device, x.dtype, x.shape[0], N, K)
    if why is not None:
        raise ValueError(f"cuSPARSELt: {why}")
    return product(x, pack(values, pattern), N, K, bias)


def product(x: Tensor, packed: Tensor, N: int, K: int, bias: Tensor | None = None) -> Tensor:
    """The same on a packed operand.

    Raises:
        ValueError: x is not ``[M, K]``, or no verified algorithm exists.
    """
    if x.dim() != 2 or x.shape[1] != K:
        raise ValueError(f"cuSPARSELt: x must be [M, {K}] for a weight [{N}, {K}], got {list(x.shape)}")
    found = algorithm(x.device, x.dtype, x.shape[0], N, K)
    if found is None:
        raise ValueError(f"cuSPARSELt: no algorithm is right for {list(x.shape)} times [{N}, {K}] in {x.dtype}")
    return primitives.product(packed, x.contiguous().t(), None if bias is None else bias.contiguous(), found)


def call_seconds(device: torch.device, calls: int = 50) -> float:
    """What a call costs the host, descriptors and plan included: mean over calls of a product that is next to nothing.

    The work on the device is not waited for.
    """
    size = 4 * MULTIPLE
    x = torch.ones(size, size, dtype=torch.float16, device=device)
    packed = primitives.compress(x * torch.tensor([1, 1, 0, 0], dtype=x.dtype, device=device).repeat(size // 4))
    primitives.product(packed, x.t(), None, Algorithm(0))
    start = time.perf_counter()
    for _ in range(calls):
        primitives.product(packed, x.t(), None, Algorithm(0))
    return (time.perf_counter() - start) / calls


# --- algorithms ------------------------------------------------------------------------------------------------------


_found: dict[tuple[torch.device, torch.dtype, int, int, int], Algorithm | None] = {}
"""What this process knows; a product is searched once."""


def algorithm(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> Algorithm | None:
    """The fastest verified algorithm, from this process, the file, or a search; None: none is right.

    While a CUDA graph is recorded nothing is searched: None, and another way computes the product.
    """
    key = (device, dtype, M, N, K)
    if key not in _found:
        name = _name(dtype, M, N, K)
        stored = _load(device).get(name)
        if stored is not None:
            _found[key] = Algorithm(*stored)
        elif primitives.capturing():
            return None
        else:
            _found[key] = _search(device, dtype, M, N, K)
            _store(device, name, _found[key])
    return _found[key]


def _search(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> Algorithm | None:
    with torch.no_grad(), torch.inference_mode(False):
        pattern = pack_mask(random_mask(N, K, Pattern(2, 4), seed=0, path="cusparselt")).to(device)
        trials = []
        for _ in range(TRIALS):
            values, x = (torch.randn(*size, device=device).to(dtype) for size in ((N, K // 2), (M, K)))
            dense = reference.expand(values, pattern, 2, 4)
            trials.append((x, primitives.compress(dense.contiguous()), x.float() @ dense.float().t()))
        times = {}
        for candidate in _candidates(trials[0][1], trials[0][0]):
            if all(_right(x, packed, truth, candidate) for x, packed, truth in trials):
                x, packed, _ = trials[0]
                call = functools.partial(primitives.product, packed, x.t(), None, candidate)
                times[candidate] = primitives.seconds(call)
    return min(times, key=times.__getitem__, default=None)


def _candidates(packed: Tensor, x: Tensor) -> Iterator[Algorithm]:
    """Each id once, and the library's own pick."""
    count = MAX_IDS
    try:
        alg_id, split_k, mode, count = primitives.suggestion(packed, x.t())
        yield Algorithm(alg_id, split_k, mode)
    except Exception as error:  # Whatever the binding raises: the ids are tried one by one anyway.
        log.info("cuSPARSELt suggests no algorithm: %s", error)
    for alg_id in range(count):
        yield Algorithm(alg_id)


def _right(x: Tensor, packed: Tensor, truth: Tensor, candidate: Algorithm) -> bool:
    """Whether the result is near, in memory that held NaN before: the allocator hands the freed block out again."""
    poison = torch.full(truth.shape, torch.nan, dtype=x.dtype, device=x.device)
    del poison
    try:
        result = primitives.product(packed, x.t(), None, candidate).float()
    except Exception as error:  # An id that the library refuses.
        log.debug("cuSPARSELt refuses %s: %s", candidate, error)
        return False
    # Inputs have unit variance: an error of 2^-7 of the sums' deviation is above any rounding of 16-bit results.
    near = bool(((result - truth).abs() <= 2.0**-7 * truth.abs() + 2.0**-7 * (x.shape[1] / 2) ** 0.5).all())
    if not near:
        log.warning("cuSPARSELt's algorithm %s is wrong for %s and is not used", candidate, list(truth.shape))
    return near


def _name(dtype: torch.dtype, M: int, N: int, K: int) -> str:
    return f"{str(dtype)[6:]} {M} {N} {K}"


def _path(device: torch.device) -> Path:
    names = (primitives.name(device), str(primitives.version()), torch.__version__)
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
    return cpu_build.cache_folder() / f"cusparselt-{digest}.json"


def _load(device: torch.device) -> dict[str, list[int]]:
    path = _path(device)
    try:
        found: dict[str, list[int]] = json.loads(path.read_text())
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); algorithms are searched again", path, error)
        return {}


def _store(device: torch.device, name: str, found: Algorithm | None) -> None:
    """That none is right is not stored: the next process looks again."""
    if found is None:
        return
    path = _path(device)
    text = json.dumps({**_load(device), name: dataclasses.astuple(found)}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


# --- operands that are kept ------------------------------------------------------------------------------------------


class Packed:
    """A packed operand that stays, at one address, and follows its values."""

    def __init__(self, values: Tensor, pattern: Tensor) -> None:
        self.N, self.K = values.shape[0], values.shape[1] * 2
        self.buffer = pack(values.detach(), pattern)
        self._version = values._version

    def refresh(self, values: Tensor, pattern: Tensor, always: bool = False) -> None:
        """Take over the values if they changed in place since; ``always`` for updates that no counter shows."""
        if values._version == self._version and not always:
            return
        with torch.no_grad():
            if in_place(values.device, values.dtype):
                self.buffer.view(-1)[: values.numel()].copy_(values.reshape(-1))
            else:
                self.buffer.copy_(pack(values.detach(), pattern))
        self._version = values._version

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``Y [M, N] = X W^T + bias``."""
        return product(x, self.buffer, self.N, self.K, bias)


@functools.lru_cache(maxsize=16)
def in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether values can be written into a packed operand: tested on one, at the first use on a device.

    Their order in it is no documented fact.  If the values of another weight of the same pattern, written over the
    first part of the buffer, make values and metadata (one bit a dense entry) equal to those of that weight's packed
    form, it is theirs.
    """
    N, K = 4 * MULTIPLE, 8 * MULTIPLE
    with torch.no_grad(), torch.inference_mode(False):
        pattern = pack_mask(random_mask(N, K, Pattern(2, 4), seed=1, path="cusparselt")).to(device)
        # Small whole numbers, each entry of the kind that no neighbour shares.
        before, after = (torch.arange(N * K // 2, device=device).view(N, -1) % p + 1 for p in (97, 89))
        packed, expected = (
            primitives.compress(reference.expand(v.to(dtype), pattern, 2, 4).contiguous()) for v in (before, after)
        )
        packed.view(-1)[: N * K // 2] = after.to(dtype).view(-1)
        used = N * K // 2 + N * K // 16
        ours, theirs = (whole.view(-1).view(torch.int16)[:used] for whole in (packed, expected))
        right = len(ours) == used and torch.equal(ours, theirs)
    if not right:
        log.info("cuSPARSELt keeps the values of packed operands in an order of its own on %s: packed anew", device)
    return right
