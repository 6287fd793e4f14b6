"""What differs between the releases of Triton, 3.6 to 3.9, under one name each; Gluon has no stable interface yet.

Importing this module imports Triton.

- A barrier of all threads is ``thread_barrier`` in 3.6 and ``barrier`` later.
- Asynchronous copies are ``async_copy_global_to_shared`` in 3.6 and 3.7 and ``async_load`` later; where both are
  there, the old name of the one from pointers raises.
"""

from __future__ import annotations

import functools

from torch import Tensor
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
load_tile = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
commit_copies = async_copy.commit_group
wait_for_copies = async_copy.wait_group
fence_async_shared = hopper.fence_async_shared
mbarrier = hopper.mbarrier


def tiles(words: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How the tensor memory accelerator finds tiles ``[rows, columns]`` of int32 ``words``; outside there are zeros.

    In shared memory, a row of a tile is as long as the swizzle: 64 or 128 bytes.  ``words`` begins at a multiple of 16
    bytes, and so do its rows.
    """
    return TensorDescriptor.from_tensor(words, [rows, columns], _layout(columns))


@functools.cache
def _layout(columns: int) -> gl.NVMMASharedLayout:
    """Each launch makes tiles, and making a layout takes longer than the rest of that."""
    return gl.NVMMASharedLayout(swizzle_byte_width=4 * columns, element_bitwidth=32, rank=2)


def assembler(arch: int) -> str:
    """Where the ptxas is that Triton uses for an architecture (90 for compute capability 9.0)."""
    path: str = get_ptxas(arch).path
    return path
