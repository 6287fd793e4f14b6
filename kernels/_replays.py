"""Calls of products that are replayed as launches of kernels.

A call of a product checks its operands, asks which configuration to take, makes views and descriptors, and launches
one or two kernels at the end: on the host this takes several times as long as ``torch.mm``, which decides how fast a
model decodes without CUDA graphs.  All of it depends only on the kind of the call: on its settings and on the dtypes,
shapes, strides, alignments and the device of its operands.

So a call of a new kind is watched.  If it does nothing but allocate scratch memory, make views and launch kernels on
these and on its operands, it is recorded, and later calls of the same kind repeat just that.  A call that uses any
other operator of PyTorch (it copies an operand into another layout, or multiplies dense matrices) is never replayed.

Private names used, tested on torch 2.11 to 2.13: ``torch.utils._python_dispatch.TorchDispatchMode``, which sees the
operators of a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slope_compile.kernels import launching
from slope_compile.kernels.launching import MOST, Grid, device_of

ATTEMPTS = 3
"""How often a kind of call is watched.  The first call also tests the kernels, which is more than launching them."""

_ALLOCATIONS = frozenset((torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default))

Operands = tuple[Tensor | None, ...]


class Replays:
    """The recorded calls of some products."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Calls | int] = {}

    def call(self, product: Callable[..., Tensor], operands: Operands, *settings: Any) -> Tensor:
        """``product(*operands, *settings)``.

        Args:
            product: writes its result to its last operand and returns that.  What it does may depend on the kind of
                its operands and not on the numbers in them.
            settings: hashable.
        """
        kind = (product, settings, *map(_kind, operands))
        known = self._known.get(kind, 0)
        if launching.watched() or known == ATTEMPTS:  # a call around this one sees all that this one does
            return product(*operands, *settings)
        if isinstance(known, _Calls):
            return known.repeat(operands)
        recording = _Recording(operands)
        with launching.watch(recording.launched), recording:
            result = product(*operands, *settings)
        calls = recording.calls() if result is operands[-1] else None
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[kind] = known + 1 if calls is None else calls
        return result


def _kind(operand: Tensor | None) -> Any:
    """What decides about a launch.  Triton specialises on whether an address is a multiple of 16 bytes."""
    if operand is None:
        return None
    return operand.dtype, operand.shape, operand.stride(), operand.data_ptr() % 16, operand.get_device()


@dataclasses.dataclass(frozen=True)
class _Launch:
    """One launch of a compiled kernel."""

    kernel: Any
    grid: Grid
    arguments: tuple[Any, ...]
    """All of them; tensors are left out."""
    tensors: tuple[tuple[int, int], ...]
    """Position of an argument, and which tensor it is: first operands are counted, then scratch memory."""
    tiles: tuple[tuple[int, int], ...]
    """The same for descriptors of tiles, which stay among the arguments without their tensor."""

    def repeat(self, tensors: list[Tensor | None]) -> None:
        arguments = list(self.arguments)
        for position, which in self.tensors:
            arguments[position] = tensors[which]
        for position, which in self.tiles:
            arguments[position] = _tiles_of(arguments[position], tensors[which])
        self.kernel[self.grid](*arguments)


@dataclasses.dataclass(frozen=True)
class _Calls:
    """All that a call of a product did."""

    scratch: tuple[tuple[torch.Size, torch.dtype], ...]
    launches: tuple[_Launch, ...]

    def repeat(self, operands: Operands) -> Tensor:
        out = operands[-1]
        assert out is not None
        tensors = list(operands)
        for shape, dtype in self.scratch:
            tensors.append(torch.empty(shape, dtype=dtype, device=out.device))
        with device_of(out):
            for launch in self.launches:
                launch.repeat(tensors)
        return out


class _Recording(TorchDispatchMode):
    """Watches a call: the operators of PyTorch that it uses, and what it launches."""

    def __init__(self, operands: Operands) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        given = [(index, operand) for index, operand in enumerate(operands) if operand is not None]
        self._places = {operand.data_ptr(): index for index, operand in given}
        # An address then says which operand an argument is.
        self._complete = len(self._places) == len(given)
        self._operands = len(operands)
        self._scratch: list[Tensor] = []  # kept until the end, so that no address comes twice
        self._launches: list[_Launch] = []
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._places[result.data_ptr()] = self._operands + len(self._scratch)
            self._scratch.append(result)
        elif not func.is_view:
            self._complete = False
        return result

    def launched(self, kernel: Any, grid: Grid, arguments: tuple[Any, ...]) -> None:
        if kernel is None:
            self._complete = False
        if not self._complete:
            return
        left: list[Any] = []
        tensors: list[tuple[int, int]] = []
        tiles: list[tuple[int, int]] = []
        for position, argument in enumerate(arguments):
            base = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
            if base is None:
                left.append(argument)
                continue
            place = self._places.get(base.data_ptr())
            if place is None:  # within a tensor, or not made in this call
                self._complete = False
                return
            whole = base is argument
            (tensors if whole else tiles).append((position, place))
            left.append(None if whole else _tiles_of(argument, None))
        self._launches.append(_Launch(kernel, grid, tuple(left), tuple(tensors), tuple(tiles)))

    def calls(self) -> _Calls | None:
        """What the call did, None if not all of it can be repeated."""
        scratch = tuple((tensor.shape, tensor.dtype) for tensor in self._scratch)
        return _Calls(scratch, tuple(self._launches)) if self._complete else None


def _tiles_of(tiles: Any, tensor: Tensor | None) -> Any:
    """A descriptor of the same tiles of another tensor.  The launch reads the tensor's address alone."""
    moved = object.__new__(type(tiles))
    moved.__dict__.update(tiles.__dict__)
    moved.base = tensor
    return moved
