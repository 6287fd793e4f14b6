"""Autocast for an operator whose tensors should run in the autocast dtype, as ``torch.nn.functional.linear`` does.

``torch.library.register_autocast`` fixes the dtype at registration; a linear must follow the dtype of the context it
runs in.  Private names used: ``torch._C._ExcludeDispatchKeyGuard``, ``DispatchKeySet``, ``DispatchKey`` (2.11-2.13).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register_autocast(library: torch.library.Library, name: str, op: Any) -> None:
    """Run ``op`` under autocast with its floating tensors cast to the context's dtype (float64 is left alone)."""
    for device, key in DEVICES.items():
        library.impl(name, _caster(op, device, key), key)


def _caster(op: Any, device: str, key: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)

        def cast(value: Any) -> Any:
            eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if eligible else value

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(cast(value) for value in args))

    return call
