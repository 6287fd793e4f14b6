"""Which tensors share memory.

Private name used, tested on torch 2.11 and 2.13: ``UntypedStorage._cdata``, the address of the storage object.  Unlike
the address of the data, it also tells storages on the meta device apart.
"""

from __future__ import annotations

from torch import Tensor


def storage_key(tensor: Tensor) -> int:
    """A number that is the same for two live tensors exactly if they share a storage, on any device."""
    key: int = tensor.untyped_storage()._cdata
    return key
