"""2:4 products by NVIDIA's cuSPARSELt through PyTorch's primitives, called so that their silent traps cannot be met.

What the primitives do and do not (PyTorch 2.11 to 2.13):

- The sparse operand is the left one and packed: W ``[N, K]`` for ``Y = X W^T``.  The dense operand is ``X.t()``; it is
  taken for the transpose of a *contiguous* matrix, whatever its strides are, so X is made contiguous first.  With
  ``transpose_result=True`` the result is ``[M, N]`` in memory, not a view.
- Nobody checks that the sizes along K agree, nor that what is packed has the pattern: both are checked here, or follow
  from the storage.
- Some algorithm ids return wrong numbers, in some runs, or write nothing at all, and some end in an illegal instruction
  (seen on an H200 in float16), after which no CUDA call of the process works.  So nothing is tried here: a product runs
  by an algorithm that was verified before, by another process, on this GPU, with this library, for exactly its sizes
  and dtype.  ``slope-compile tune --device cuda`` looks for such algorithms and keeps them in a file.  Where it has not
  been run, cuSPARSELt is never chosen.
- PyTorch keeps one handle of the library for each thread, made for the device that the thread first used it on (seen in
  its source); on another device that thread must not call it.
- Each call makes the library's descriptors and plan anew, some 50 to 200 microseconds on the host (reports of others).
  A CUDA graph pays it once.  ``alpha`` is never given: it is read back.

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
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import cache_files, reference, triton_products
from slope_compile.kernels.masks import random_mask
from slope_compile.kernels.metadata import pack_mask
from slope_compile.log import log
from slope_compile.pattern import Pattern

DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 16
"""Of all three sizes."""
OLDEST = (8, 0)

Product = tuple[torch.dtype, int, int, int]
"""dtype, M, N, K of ``Y [M, N] = X [M, K] W^T``."""


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
        """The library's own pick: id, split_k, mode; and how many ids there are.

        It runs them: for ``cusparselt_trials`` alone.
        """
        binding: Any = torch._C._cusparselt
        alg_id, split_k, mode, count = binding.mm_search(packed, dense, None, None, None, True)
        return int(alg_id), int(split_k), int(mode), int(count)

    def expand(self, values: Tensor, pattern: Tensor) -> Tensor:
        return triton_products.expand(values, pattern)


primitives = Primitives()


class _Thread(threading.local):
    device: torch.device | None = None
    """For which this thread's handle is."""


_thread = _Thread()


def _foreign(device: torch.device) -> str | None:
    if _thread.device in (None, device):
        return None
    return f"PyTorch's handle of this thread is for {_thread.device}, not for {device}"


def _claim(device: torch.device) -> None:
    """Before a call of the library.

    Raises:
        ValueError: the thread's handle is for another device.
    """
    why = _foreign(device)
    if why is not None:
        raise ValueError(f"cuSPARSELt: {why}")
    _thread.device = device


def missing(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> str | None:
    """Why ``Y [M, N] = X [M, K] W^T`` cannot be computed by the library; None: it can, by a verified algorithm."""
    why = unfit(device, dtype, M, N, K) or _foreign(device)
    if why is not None or algorithm(device, dtype, M, N, K) is not None:
        return why
    if (dtype, M, N, K) in known(device):
        return "no algorithm of the library is right for these sizes"
    return "no algorithm was verified for these sizes; slope-compile tune --device cuda searches"


def unfit(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> str | None:
    """Why no algorithm needs to be searched for; None: there may be one."""
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
    """The library's operand for W ``[N, K]`` of values ``[N, K / 2]``; what was pruned is zero by construction."""
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
    """The same on a packed operand.

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
    """The fastest verified algorithm for exactly these sizes; None: none is known.  Nothing is searched."""
    verified = known(device).get((dtype, M, N, K), ())
    return verified[0] if verified else None


@functools.lru_cache(maxsize=16)
def known(device: torch.device) -> dict[Product, tuple[Algorithm, ...]]:
    """What searches found: the verified algorithms of a product, the fastest first; none where none is right."""
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
    """Keep what a search found, the fastest first, for this process and later ones."""
    known.cache_clear()  # another process may have written meanwhile
    found = {**known(device), product: tuple(verified)}
    text = json.dumps({_name(p): [dataclasses.astuple(one) for one in found[p]] for p in found}, indent=1)
    cache_files.write(_path(device), text)
    known.cache_clear()


def identity(device: torch.device) -> tuple[str, str, str]:
    """What a verified algorithm holds for: GPU, library and torch."""
    return primitives.name(device), str(primitives.version()), torch.__version__


def _name(product: Product) -> str:
    dtype, *sizes = product
    return " ".join((str(dtype)[6:], *map(str, sizes)))


def _product(name: str) -> Product:
    dtype, M, N, K = name.split()
    return {str(one)[6:]: one for one in DTYPES}[dtype], int(M), int(N), int(K)


def _path(device: torch.device) -> Path:
    return cache_files.cache_folder() / f"cusparselt-verified-{cache_files.key(*identity(device))}.json"


# --- operands that are kept ------------------------------------------------------------------------------------------


class Packed:
    """A packed operand that stays, at one address, and follows its values.

    Raises:
        ValueError: no algorithm was verified for a product with such a weight, whatever its number of tokens.
    """

    def __init__(self, values: Tensor, pattern: Tensor) -> None:
        self.N, self.K = values.shape[0], values.shape[1] * 2
        weight = (values.dtype, self.N, self.K)
        if not any(found and (dtype, N, K) == weight for (dtype, _, N, K), found in known(values.device).items()):
            raise ValueError(f"cuSPARSELt: no algorithm was verified for weights [{self.N}, {self.K}], {values.dtype}")
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
    _claim(device)
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
