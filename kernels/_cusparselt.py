"""2:4 products by NVIDIA's cuSPARSELt through PyTorch's primitives, so that their silent failure modes cannot occur.

Properties of the primitives (PyTorch 2.11 to 2.13):

- The sparse operand is the left one and packed: W ``[N, K]`` for ``Y = X W^T``.  The dense operand is ``X.t()``.  The
  library assumes that it is the transpose of a *contiguous* matrix, whatever its strides are, so X is made contiguous
  first.  With ``transpose_result=True`` the result is ``[M, N]`` in memory, not a view.
- The primitives check neither that the sizes along K agree nor that the packed matrix has the pattern.  Both are
  checked here or follow from the storage.
- Some algorithm ids return wrong numbers in some runs, or write nothing at all.  Others end in an illegal instruction
  (seen on an H200 in float16), after which every CUDA call of the process fails.  So no algorithm is tried here: a
  product uses only an algorithm that another process verified on this GPU, with this library, for exactly these sizes
  and this dtype.  ``slope-compile tune --device cuda`` searches for such algorithms and stores them in a file.  Without
  that file, cuSPARSELt is never chosen.
- PyTorch keeps one handle of the library per thread, made for the device on which the thread first used the library
  (seen in its source).  The thread must not call the library on another device.
- Each call makes the library's descriptors and plan anew, which reportedly takes 50 to 200 microseconds on the host.
  A CUDA graph pays this once.  ``alpha`` is never given, because the library would read it back from the device.

**Packed operands.**  The Parameter holds values and the pattern is a buffer.  A packed operand is derived from them and
is as large as both.  By default it is made for a call and freed after it (one kernel to expand, one to pack, and a
dense scratch tensor), so that no second copy of the weights stays.  :class:`Packed` keeps one on request.  It follows
in-place updates of the values: it copies them into the operand if that was found to work on the device, else it packs
anew.  Either way the address stays the same, so that a captured graph stays valid.

The module uses private names, tested on torch 2.13 without a GPU by fakes: ``torch._cslt_compress``,
``torch._cslt_sparse_mm``, ``torch._C._cusparselt.mm_search``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_compile.dtypes import dtype_name
from slope_compile.kernels import cache_files, reference, triton_products
from slope_compile.kernels._versions import writing
from slope_compile.kernels.masks import random_mask
from slope_compile.kernels.metadata import pack_mask
from slope_compile.log import log
from slope_compile.pattern import Pattern

DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 16
"""M, N and K must be multiples of it."""
OLDEST = (8, 0)
"""Oldest compute capability."""

Product = tuple[torch.dtype, int, int, int]
"""dtype, M, N, K of ``Y [M, N] = X [M, K] W^T``."""


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The library's parameters for computing a product."""

    alg_id: int
    split_k: int = 1
    split_k_mode: int = -1


class Primitives:
    """PyTorch's primitives; the tests replace them."""

    def version(self) -> int | None:
        """Version of the library; None if this PyTorch does not include it."""
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
        """The library's own choice (id, split_k, mode), and the number of ids.

        The library runs algorithms for it, so only ``cusparselt_trials`` may call this.
        """
        binding: Any = torch._C._cusparselt
        alg_id, split_k, mode, count = binding.mm_search(packed, dense, None, None, None, True)
        return int(alg_id), int(split_k), int(mode), int(count)

    def expand(self, values: Tensor, pattern: Tensor) -> Tensor:
        return triton_products.expand(values, pattern)


primitives = Primitives()


class _Thread(threading.local):
    device: torch.device | None = None
    """The device of this thread's handle; None if it has none yet."""


_thread = _Thread()


def _foreign(device: torch.device) -> str | None:
    if _thread.device in (None, device):
        return None
    return f"PyTorch's handle of this thread is for {_thread.device}, not for {device}"


def _claim(device: torch.device) -> None:
    """Claim this thread's handle for a device; required before every call of the library.

    Raises:
        ValueError: the thread's handle is for another device.
    """
    why = _foreign(device)
    if why is not None:
        raise ValueError(f"cuSPARSELt: {why}")
    _thread.device = device


def missing(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> str | None:
    """The reason why the library cannot compute ``Y [M, N] = X [M, K] W^T``; None if a verified algorithm can."""
    why = unfit(device, dtype, M, N, K) or _foreign(device)
    if why is not None or algorithm(device, dtype, M, N, K) is not None:
        return why
    if (dtype, M, N, K) in known(device):
        return "no algorithm of the library is right for these sizes"
    return "no algorithm was verified for these sizes; slope-compile tune --device cuda searches"


def unfit(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> str | None:
    """The reason why there cannot be an algorithm for a product; None if a search may find one."""
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
    return f"{wrong} must be positive multiples of {MULTIPLE}" if wrong else None


def pack(values: Tensor, pattern: Tensor) -> Tensor:
    """The library's operand for W ``[N, K]``, from values ``[N, K / 2]``; pruned entries are zero by construction."""
    _claim(values.device)
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
    """:func:`linear` with a packed operand.

    Raises:
        ValueError: x is not ``[M, K]``, or no verified algorithm exists.
    """
    if x.dim() != 2 or x.shape[1] != K:
        raise ValueError(f"cuSPARSELt: x must be [M, {K}] for a weight [{N}, {K}], got {list(x.shape)}")
    found = algorithm(x.device, x.dtype, x.shape[0], N, K)
    if found is None:
        raise ValueError(f"cuSPARSELt: no algorithm was verified for {list(x.shape)} times [{N}, {K}] in {x.dtype}")
    _claim(x.device)
    return primitives.product(packed, x.contiguous().t(), None if bias is None else bias.contiguous(), found)


# --- algorithms ------------------------------------------------------------------------------------------------------


def algorithm(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> Algorithm | None:
    """The fastest verified algorithm for exactly these sizes; None if none is known.  It does not search."""
    verified = known(device).get((dtype, M, N, K), ())
    return verified[0] if verified else None


@functools.lru_cache(maxsize=16)
def known(device: torch.device) -> dict[Product, tuple[Algorithm, ...]]:
    """Results of earlier searches: product -> verified algorithms, the fastest first; empty if none was right."""
    path = _path(device)
    try:
        stored: dict[str, list[list[int]]] = json.loads(path.read_text())
        return {_product(name): tuple(Algorithm(*map(int, one)) for one in found) for name, found in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        log.warning("%s cannot be read (%s); slope-compile tune --device cuda searches again", path, error)
        return {}


def store(device: torch.device, product: Product, verified: Sequence[Algorithm]) -> None:
    """Store the result of a search, the fastest first, for this process and later ones."""
    known.cache_clear()  # another process may have written to the file
    found = {**known(device), product: tuple(verified)}
    text = json.dumps({_name(p): [dataclasses.astuple(one) for one in found[p]] for p in found}, indent=1)
    cache_files.write(_path(device), text)
    known.cache_clear()


def identity(device: torch.device) -> tuple[str, str, str]:
    """GPU, library version and torch version, for which a verified algorithm is valid."""
    return primitives.name(device), str(primitives.version()), torch.__version__


def _name(product: Product) -> str:
    dtype, *sizes = product
    return " ".join((dtype_name(dtype), *map(str, sizes)))


def _product(name: str) -> Product:
    dtype, M, N, K = name.split()
    return {dtype_name(one): one for one in DTYPES}[dtype], int(M), int(N), int(K)


def _path(device: torch.device) -> Path:
    return cache_files.cache_folder() / f"cusparselt-verified-{cache_files.key(*identity(device))}.json"


# --- operands that are kept ------------------------------------------------------------------------------------------


class Packed:
    """A packed operand that is kept at one address and follows updates of its values.

    Raises:
        ValueError: no algorithm was verified for any number of tokens with such a weight.
    """

    def __init__(self, values: Tensor, pattern: Tensor) -> None:
        self.N, self.K = values.shape[0], values.shape[1] * 2
        weight = (values.dtype, self.N, self.K)
        if not any(found and (dtype, N, K) == weight for (dtype, _, N, K), found in known(values.device).items()):
            raise ValueError(f"cuSPARSELt: no algorithm was verified for weights [{self.N}, {self.K}], {values.dtype}")
        self.buffer = pack(values.detach(), pattern)
        self._written = writing(values)

    def refresh(self, values: Tensor, pattern: Tensor, always: bool = False) -> None:
        """Update the operand if the values changed in place, or ``always``, for changes without a new version."""
        if writing(values) == self._written and not always:
            return
        with torch.no_grad():
            if in_place(values.device, values.dtype):
                self.buffer.view(-1)[: values.numel()].copy_(values.reshape(-1))
            else:
                self.buffer.copy_(pack(values.detach(), pattern))
        self._written = writing(values)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``Y [M, N] = X W^T + bias``."""
        return product(x, self.buffer, self.N, self.K, bias)


@functools.lru_cache(maxsize=16)
def in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether values can be written into a packed operand, tested at the first use on a device.

    The order of values in it is not documented.  The test writes the values of a second weight with the same pattern
    over the first part of the buffer.  If values and metadata (one bit per dense entry) then equal those of that
    weight's packed form, the order is that of the values.
    """
    N, K = 4 * MULTIPLE, 8 * MULTIPLE
    _claim(device)
    with torch.no_grad(), torch.inference_mode(False):
        pattern = pack_mask(random_mask(N, K, Pattern(2, 4), seed=1, path="cusparselt")).to(device)
        # Small whole numbers; neighbouring entries differ.
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
