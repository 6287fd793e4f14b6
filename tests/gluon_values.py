"""Numbers, tensors and pointers of a Gluon kernel that runs on the CPU (``gluon_cpu``)."""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Hazard(Exception):
    """The kernel does something that is right on a GPU only by chance."""


class Value:
    """A tensor or a number of the kernel: integers wrap as on the device, numbers of 0 dimensions promote like any."""

    def __init__(self, data: Any) -> None:
        self._data: Tensor | None = data if isinstance(data, Tensor) else torch.tensor(data, dtype=_dtype_of(data))

    @classmethod
    def pending(cls) -> Value:
        """One that is being computed; not to be looked at before :meth:`resolve`."""
        value = cls(0)
        value._data = None
        return value

    def resolve(self, data: Tensor) -> None:
        self._data = data

    @property
    def data(self) -> Tensor:
        if self._data is None:
            raise Hazard("a result is used while it is being computed")
        return self._data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.data.contiguous().view(dtype) if bitcast else self.data.to(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    def __index__(self) -> int:
        return int(self.data.item())

    __hash__ = None  # type: ignore[assignment]


def _dtype_of(number: Any) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    if isinstance(number, int):
        return torch.int32 if -(1 << 31) <= number < 1 << 31 else torch.int64  # as Triton takes arguments
    return torch.float32


def _operation(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def apply(left: Any, right: Any) -> Any:
        if isinstance(right, Pointer):
            return right + left
        a, b = as_value(left), as_value(right)
        dtype = torch.promote_types(a.dtype, b.dtype)
        return Value(function(a.data.to(dtype), b.data.to(dtype)))

    return apply


def _reversed(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda right, left: apply(left, right)


def as_value(item: Any) -> Value:
    return item if isinstance(item, Value) else Value(item)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": _divide, "mod": torch.fmod,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "lshift": operator.lshift, "rshift": operator.rshift,
}  # fmt: skip
for _name, _function in _OPERATORS.items():
    setattr(Value, f"__{_name}__", _operation(_function))
    setattr(Value, f"__r{_name}__", _reversed(_operation(_function)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operation(getattr(operator, _name)))


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Addresses in a tensor: offsets in elements from its first one."""

    base: Tensor
    """Flat, from the tensor's first element to its last."""
    offset: Value

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.as_strided((last + 1,), (1,)), Value(torch.tensor(0)))

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.base.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.offset + as_value(offset))  # type: ignore[operator]

    __radd__ = __add__

    def checked(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets and mask, broadcast; raises if an unmasked offset lies outside the tensor."""
        inside = torch.tensor(True) if mask is None else as_value(mask).data
        offset, inside = torch.broadcast_tensors(self.offset.data, inside)
        wrong = inside & ((offset < 0) | (offset >= self.base.numel()))
        if bool(wrong.any()):
            raise Hazard(f"element {int(offset[wrong][0])} of {self.base.numel()}")
        return offset, inside


def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Value:
    offset, inside = pointer.checked(mask)
    found = pointer.base[torch.where(inside, offset, 0)]
    return Value(torch.where(inside, found, torch.zeros_like(found)))


def store(pointer: Pointer, value: Value, mask: Any = None) -> None:
    offset, inside = pointer.checked(mask)
    inside, data = torch.broadcast_tensors(inside, value.data)
    pointer.base[offset.expand_as(inside)[inside]] = data[inside]
