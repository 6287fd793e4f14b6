"""Launches of Triton and Gluon kernels with little work on the host.

Triton looks a launch up anew each time: it binds the arguments by name, works out what of them it compiles in, and
turns that into a text; some 20 to 50 microseconds, more than many a product takes on a GPU.  :class:`Launcher`
remembers which compiled kernel a launch led to under all that Triton may look at (values of numbers, dtypes and
alignment of tensors, constants, the device) and calls that one; what follows is Triton's own launch of a compiled
kernel, hooks included.

Everything else goes the usual way: the first launch of each kind, Triton's interpreter, and what the tests put in the
place of a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

MOST = 4096
"""Kinds of launches that a kernel remembers; token counts that never repeat must not fill the memory."""


class Kernels:
    """The kernels of a module, by name, each with its :class:`Launcher`; other names are what they are there."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if hasattr(found, "warmup"):  # as Triton's kernels have
            found = Launcher(found)
        setattr(self, name, found)
        return found


class Launcher:
    """One kernel, launched as in Triton: ``launcher[grid](*arguments, **options)``."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.warmup = kernel.warmup
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """On the current device and stream.

        Args:
            arguments: in the order of the kernel's parameters, constants apart: tensors, numbers, descriptors of tiles.
            options: the constants, which are the last parameters, and Triton's options.
        """
        key = (_device(arguments), *map(_kind, arguments), *options.items())
        known = self._known.get(key)
        if known is not None:
            compiled, constants = known
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
            return
        compiled = self.kernel[grid](*arguments, **options)
        if key[0] is not None and hasattr(compiled, "packed_metadata"):
            if len(self._known) >= MOST:
                self._known.clear()
            left = self.kernel.params[len(arguments) :]
            self._known[key] = compiled, tuple(options.get(p.name, p.default) for p in left)


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _device(arguments: tuple[Any, ...]) -> int | None:
    """The current one, where a launch has tensors on a GPU."""
    on_gpu = any(isinstance(argument, Tensor) and argument.is_cuda for argument in arguments)
    return torch.cuda.current_device() if on_gpu else None


def _kind(argument: Any) -> Any:
    """All that Triton may compile in of an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, int):
        return argument
    # A descriptor of tiles: of those the shape of a tile, its layout and the dtype.
    return tuple(argument.block_shape), argument.layout, argument.base.dtype
