"""Runs Gluon kernels on CPU tensors from their unmodified source, one program after the other, without Triton.

What a GPU would do differently from run to run is done at its worst here, as an exception (:class:`Hazard`):

- An asynchronous copy is not there before ``wait_group`` *and* a barrier: until the wait it may still be under way,
  and until the barrier other threads may not see it.
- A stage of shared memory that was read since the last barrier must not be copied to: another warp may still read it.
- Where a conversion of layouts goes through shared memory, no copy may be under way.
- A load or store outside a tensor that no mask keeps.

Tensors are computed as a whole; layouts matter in inline assembly only.  ``mma.sp`` is computed from the registers of
each lane, which the operands' layout gives, by the fragments in the PTX manual (:func:`mma_sp`).

Not covered: races through ordinary loads and stores, and what the compiler makes of the kernel
(``gluon_offline`` looks at that).
"""

from __future__ import annotations

import builtins
import dataclasses
import operator
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import gluon_products

LANES = 32


class Hazard(Exception):
    """Something that is right on a GPU only by chance."""


class Value:
    """A tensor or a number of the kernel: integers wrap as on the device, numbers of 0 dimensions promote like any."""

    def __init__(self, data: Any) -> None:
        self.data: Tensor = data if isinstance(data, Tensor) else torch.tensor(data, dtype=_dtype_of(data))

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype))

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
    return torch.int32 if isinstance(number, int) else torch.float32


def _operation(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def apply(left: Any, right: Any) -> Any:
        if isinstance(right, Pointer):
            return right + left
        a, b = _value(left), _value(right)
        dtype = torch.promote_types(a.dtype, b.dtype)
        return Value(function(a.data.to(dtype), b.data.to(dtype)))

    return apply


def _reversed(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda right, left: apply(left, right)


def _value(item: Any) -> Value:
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
        return Pointer(self.base, self.offset + _value(offset))  # type: ignore[operator]

    __radd__ = __add__

    def checked(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets and mask, broadcast; what is not masked lies inside."""
        inside = torch.tensor(True) if mask is None else _value(mask).data
        offset, inside = torch.broadcast_tensors(self.offset.data, inside)
        wrong = inside & ((offset < 0) | (offset >= self.base.numel()))
        if bool(wrong.any()):
            raise Hazard(f"element {int(offset[wrong][0])} of {self.base.numel()}")
        return offset, inside


@dataclasses.dataclass
class Stage:
    """One part of shared memory that is copied to and read as a whole."""

    data: Tensor | None = None
    """What all threads see; None: nothing, or not what they should."""
    being_read: bool = False


@dataclasses.dataclass
class Ring:
    stages: list[tuple[Program, Stage]]

    def index(self, i: Any) -> View:
        return View(*self.stages[int(i)])


@dataclasses.dataclass
class View:
    program: Program
    stage: Stage

    def load(self, layout: Any) -> Value:
        if self.stage.data is None:
            raise Hazard("a stage is read before its copy is there for all threads")
        self.stage.being_read = True
        return Value(self.stage.data)


Copy = tuple[Stage, Tensor]


class Program:
    """What one program has under way."""

    def __init__(self, ids: tuple[int, int]) -> None:
        self.ids = ids
        self.stages: list[Stage] = []
        self.open: list[Copy] = []
        self.groups: list[list[Copy]] = []
        self.arrived: list[Copy] = []

    def copy(self, view: View, pointer: Pointer, mask: Any = None) -> None:
        if view.stage.being_read:
            raise Hazard("a stage is copied to that may still be read")
        view.stage.data = None
        self.open.append((view.stage, _load(pointer, mask, 0).data))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            self.arrived += self.groups.pop(0)

    def barrier(self) -> None:
        for stage, data in self.arrived:
            stage.data = data
        self.arrived = []
        for stage in self.stages:
            stage.being_read = False

    def reuse_shared_memory(self) -> None:
        if self.open or self.groups or self.arrived or any(stage.being_read for stage in self.stages):
            raise Hazard("shared memory is reused while it is in use")


def _load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Value:
    offset, inside = pointer.checked(mask)
    found = pointer.base[torch.where(inside, offset, 0)]
    return Value(torch.where(inside, found, torch.zeros_like(found)))


def _store(pointer: Pointer, value: Value, mask: Any = None) -> None:
    offset, inside = pointer.checked(mask)
    inside, data = torch.broadcast_tensors(inside, value.data)
    pointer.base[offset.expand_as(inside)[inside]] = data[inside]


@dataclasses.dataclass(frozen=True)
class LinearLayout:
    """``gl.DistributedLinearLayout``."""

    reg_bases: list[list[int]]
    lane_bases: list[list[int]]
    warp_bases: list[list[int]]
    block_bases: list[list[int]]
    shape: list[int]

    def registers(self) -> Tensor:
        """int64 ``[warps, lanes, registers]``: which element of the flattened tensor each holds."""
        counts = [1 << len(bases) for bases in (self.warp_bases, self.lane_bases, self.reg_bases)]
        at = torch.zeros(*counts, len(self.shape), dtype=torch.int64)
        for axis, bases in enumerate((self.warp_bases, self.lane_bases, self.reg_bases)):
            for bit, basis in enumerate(bases):
                chosen = (torch.arange(counts[axis]) >> bit & 1).view([-1 if d == axis else 1 for d in range(4)])
                at ^= chosen * torch.tensor(basis)
        flat = torch.zeros(counts, dtype=torch.int64)
        for d, size in enumerate(self.shape):
            flat = flat * size + at[..., d]
        return flat


def mma_sp(a: Tensor, b: Tensor, e: Tensor, c: Tensor, selector: int, dtype: torch.dtype) -> Tensor:
    """``mma.sp::ordered_metadata.m16n8k32`` as the PTX manual defines it, from and to the registers of each lane.

    Args:
        a: int32 ``[instructions, 32 lanes, 4]``, two 16-bit elements each; b: likewise.
        e: int32 ``[instructions, 32]``; c: float32 ``[instructions, 32, 4]``.
        selector: whose metadata counts: 0 for lanes 0 and 1 of each four, 1 for lanes 2 and 3.

    Returns:
        float32 ``[instructions, 32, 4]``.
    """
    count = a.shape[0]
    lane, i = torch.arange(LANES)[:, None], torch.arange(8)
    group, thread = lane >> 2, lane & 3
    # Multiplicand A: a0 to a7.  It names the row and the first of four columns; metadata name the column.
    row = torch.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)  # [32, 8]
    first = thread * 4 + torch.where(i < 4, 0, 16)
    elements = a.contiguous().view(dtype).view(count, LANES, 8)
    # The 16 bits of a row of 16 columns: the lower half of a lane's word for the rows of a group, the upper for + 8.
    source = 4 * group + 2 * selector + (first >= 16)
    word = (e.long() & 0xFFFFFFFF)[:, source] >> torch.where(row >= 8, 16, 0)
    nibble = word >> (4 * (first % 16 // 4)) & 15
    low, high = nibble & 3, nibble >> 2
    if not bool((low < high).all()):
        raise Hazard("metadata are not in ascending order")
    column = first + torch.where(i % 2 == 0, low, high)  # [count, 32, 8]
    # Multiplicand B: b0 to b7.
    depth = thread * 2 + (i & 1) + i // 2 * 8
    right = torch.zeros(count, 32, 8, dtype=torch.float64)
    right[:, depth, group.expand_as(depth)] = b.contiguous().view(dtype).view(count, LANES, 8).double()
    chosen = right[torch.arange(count)[:, None, None], column]  # [count, 32, 8, n]
    products = elements.double().unsqueeze(-1) * chosen
    sums = torch.zeros(count, 16, 8, dtype=torch.float64)
    sums.index_add_(1, row.reshape(-1), products.view(count, LANES * 8, 8))
    # Accumulator C and D: c0 to c3.
    j = torch.arange(4)
    return (c.double() + sums[:, group + j // 2 * 8, thread * 2 + (j & 1)]).float()


class Executor:
    """A module of Gluon kernels; ``executor.kernel[grid](*args, **options)`` launches one, as in Triton."""

    def __init__(self, path: Path, mutations: tuple[tuple[str, str], ...] = ()) -> None:
        """``mutations``: (text, replacement) of the source, each of which must occur."""
        source = path.read_text()
        for old, new in mutations:
            assert old in source, old
            source = source.replace(old, new, 1)
        self.program = Program((0, 0))
        self.layout: LinearLayout | None = None
        self.names: dict[str, Any] = {"__builtins__": vars(builtins) | {"__import__": self._import}}
        exec(compile(source, str(path), "exec"), self.names)

    def __getattr__(self, name: str) -> Any:
        return _Launcher(self, self.names[name])

    def _import(self, name: str, *rest: Any) -> Any:
        assert name.startswith("triton.experimental"), name
        gluon = types.SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f)
        copies = types.SimpleNamespace(
            async_copy_global_to_shared=lambda *a, **k: self.program.copy(*a, **k),
            commit_group=lambda: self.program.commit(),
            wait_group=lambda n: self.program.wait(n),
        )
        return types.SimpleNamespace(gluon=gluon, language=self._language(), async_copy=copies)

    def _language(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32, int32=torch.int32, int64=torch.int64,
            constexpr=lambda value: value, static_range=range, assume=self._assume,
            BlockedLayout=lambda *a, **k: None, SliceLayout=lambda *a: None, SwizzledSharedLayout=lambda *a, **k: None,
            DistributedLinearLayout=LinearLayout,
            program_id=lambda axis: Value(self.program.ids[axis]),
            cdiv=lambda a, b: (a + b - 1) // b,
            minimum=lambda a, b: Value(torch.minimum(_value(a).data, _value(b).data)),
            where=lambda c, a, b: Value(torch.where(_value(c).data, _value(a).data, _value(b).data)),
            arange=lambda start, stop, layout: Value(torch.arange(start, stop, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype)),
            expand_dims=lambda v, axis: Value(v.data.unsqueeze(axis)),
            permute=lambda v, order: Value(v.data.permute(*order)),
            split=lambda v: (Value(v.data[..., 0]), Value(v.data[..., 1])),
            load=_load, store=_store,
            allocate_shared_memory=self._allocate, thread_barrier=lambda: self.program.barrier(),
            convert_layout=self._convert, inline_asm_elementwise=self._assembly,
        )  # fmt: skip

    @staticmethod
    def _assume(condition: Value) -> None:
        assert bool(condition.data), "a false assumption"

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Ring:
        stages = [Stage() for _ in range(shape[0])]
        self.program.stages += stages
        return Ring([(self.program, stage) for stage in stages])

    def _convert(self, value: Value, layout: Any, assert_trivial: bool = False) -> Value:
        if assert_trivial:
            self.layout = layout
        else:
            self.program.reuse_shared_memory()
        return value

    def _assembly(self, text: str, constraints: str, args: list[Value], dtype: Any, is_pure: bool, pack: int) -> Value:
        assert text.startswith("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."), text
        assert text.endswith("{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, 0x0;") or (
            text.endswith("{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, 0x1;")
        ), text
        assert pack == 4
        assert self.layout is not None
        number = torch.bfloat16 if ".bf16.bf16." in text else torch.float16
        where = self.layout.registers()
        warps, lanes, registers = where.shape
        packed = [_registers(arg.data.expand(self.layout.shape), where) for arg in args]
        a, b, e, c = packed
        sums = mma_sp(a, b, e[:, :, 0], c, int(text[-2]), number)
        result = torch.empty(self.layout.shape).flatten()
        by_register = sums.view(warps, registers // 4, lanes, 4).transpose(1, 2).reshape(warps, lanes, registers)
        result[where.flatten()] = by_register.flatten()
        return Value(result.view(self.layout.shape))


def _registers(tensor: Tensor, where: Tensor) -> Tensor:
    """``[instructions, lanes, 4]``: each four registers in a row of a lane are the operands of one instruction."""
    warps, lanes, registers = where.shape
    held = tensor.flatten()[where]
    return held.view(warps, lanes, registers // 4, 4).transpose(1, 2).reshape(-1, lanes, 4)


@dataclasses.dataclass(frozen=True)
class _Launcher:
    executor: Executor
    kernel: Callable[..., None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            if "WN" in constants:
                assert num_warps == constants["WN"] * constants["WM"]
            given = [_argument(arg) for arg in args]
            for ids in _programs(grid):
                self.executor.program = Program(ids)
                self.kernel(*given, **constants)

        return launch


def _argument(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return Pointer.to(arg)
    return arg if arg == 1 else Value(arg)  # Triton compiles a 1 in


def _programs(grid: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for y in range(grid[1] if len(grid) > 1 else 1):
        for x in range(grid[0]):
            yield x, y


def mma_sp_source() -> Path:
    """The file of the ``mma.sp`` kernel."""
    return Path(gluon_products.__file__).with_name("gluon_mma_sp.py")
