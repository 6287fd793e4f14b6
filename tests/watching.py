"""Checks of which tensors a call leaves behind and whether it waits for a device."""

from __future__ import annotations

import gc
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Records every new storage, and raises when an operator reads from the device."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "allclose")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.READS, f"{name} waits for the device"
        if name in ("_to_copy", "copy_"):
            moved = [t.device.type for t in args if isinstance(t, Tensor)]
            assert len(set(moved)) <= 1, "a copy between devices"
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.storages.append(StorageWeakRef(tensor.untyped_storage()))
        return result

    def kept(self, *known: Tensor) -> int:
        """How many of the storages are still alive, beside those of the tensors that are known."""
        gc.collect()
        own = {tensor.untyped_storage()._cdata for tensor in known}
        return len({storage.cdata for storage in self.storages if not storage.expired()} - own)
