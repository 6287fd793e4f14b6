"""Launches of Triton and Gluon kernels with little work on the host.

Triton looks a launch up anew each time: it binds the arguments by name, finds their properties on which it specialises,
and turns these into a text.  This takes some 20 to 50 microseconds, more than many products take on a GPU.
:class:`Launcher` remembers the compiled kernel for each combination of these properties (values of numbers, dtypes and
alignment of tensors, constants, the device) and calls it by Triton's own launch of a compiled kernel, including hooks.

Other launches are left to Triton: the first launch of each kind, those in its interpreter, and those of the stand-ins
for kernels in tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

MOST = 4096
"""The most kinds of launches, or of calls that are replayed, that are remembered; token counts that never repeat must
not fill the memory."""


Grid = tuple[int, int, int]
Watch = Callable[[Any, Grid, tuple[Any, ...]], None]
"""Called after a launch with the compiled kernel, the grid, and all arguments; with None for a kernel if the launch
cannot be repeated."""


class _Watching(threading.local):
    by: Watch | None = None


_watching = _Watching()


def watched() -> bool:
    """Whether the launches of this thread are watched."""
    return _watching.by is not None


@contextlib.contextmanager
def watch(by: Watch) -> Iterator[None]:
    """Watch the launches of this thread."""
    _watching.by = by
    try:
        yield
    finally:
        _watching.by = None


@dataclasses.dataclass(frozen=True)
class _Compiled:
    kernel: Any
    constants: tuple[Any, ...]


class Kernels:
    """The kernels of a module, by name, each with its :class:`Launcher`; other names give the module's own objects."""

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
        self._known: dict[tuple[Any, ...], _Compiled] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid, None)

    def checked(self, grid: tuple[int, ...], check: Callable[[], None]) -> Callable[..., None]:
        """Like ``launcher[grid]``, with ``check`` called before the first launch of each kind; it may raise."""
        return functools.partial(self._launch, grid, check)

    def _launch(
        self, grid: tuple[int, ...], check: Callable[[], None] | None, *arguments: Any, **options: Any
    ) -> None:
        """On the current device and stream.

        Args:
            check: called where the kind of launch is not remembered.
            arguments: in the order of the kernel's parameters, constants apart: tensors, numbers, descriptors of tiles.
            options: the constants, which are the last parameters, and Triton's options.
        """
        blocks: Grid = (*grid, 1, 1)[:3]  # type: ignore[assignment]  # of one to three numbers
        key = (_device(arguments), *map(_kind, arguments), *options.items())
        known = self._known.get(key)
        if known is not None:
            known.kernel[blocks](*arguments, *known.constants)
        else:
            if check is not None:
                check()
            known = self._found(key, self.kernel[grid](*arguments, **options), options, len(arguments))
        if _watching.by is not None:
            kernel, constants = (None, ()) if known is None else (known.kernel, known.constants)
            _watching.by(kernel, blocks, (*arguments, *constants))

    def _found(self, key: tuple[Any, ...], kernel: Any, options: dict[str, Any], given: int) -> _Compiled | None:
        """Remember what Triton launched, if it can be launched again without Triton."""
        if key[0] is None or not hasattr(kernel, "packed_metadata"):
            return None
        if len(self._known) >= MOST:
            self._known.clear()
        constants = tuple(options.get(p.name, p.default) for p in self.kernel.params[given:])
        found = self._known[key] = _Compiled(kernel, constants)
        return found


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _device(arguments: tuple[Any, ...]) -> int | None:
    """The current device if a launch has tensors on a GPU, else None."""
    on_gpu = any(isinstance(argument, Tensor) and argument.is_cuda for argument in arguments)
    return torch.cuda.current_device() if on_gpu else None


def _kind(argument: Any) -> Any:
    """The properties of an argument on which Triton may specialise."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, int):
        return argument
    # A descriptor of tiles: Triton specialises on the shape and the layout of a tile and on the dtype.
    return tuple(argument.block_shape), argument.layout, argument.base.dtype
