"""Whether something was written to a tensor.

Private name used, tested on torch 2.11 and 2.13: ``Tensor._version``, the counter that autograd's own checks read.
Each in-place operation raises it; fused optimizers and writes through ``tensor.data`` do not.  Tensors that were made
in inference mode have none.
"""

from __future__ import annotations

from torch import Tensor


def writing(tensor: Tensor) -> tuple[int, int]:
    """Version and address of a tensor: others after something was written to it or put in its place."""
    return tensor._version, tensor.data_ptr()
