"""Runs Gluon kernels on CPU tensors from their unmodified source, one program after the other, without Triton.

Code whose result on a GPU may differ from run to run raises an exception here (:class:`Hazard`).  The rules:

- The data of an asynchronous copy must not be read before ``wait_group`` *and* a barrier, or before a wait on its
  mbarrier in the right phase.  Until then the copy may be in flight, or other threads may not see it.
- A stage of shared memory must not be copied to if it was read since the last barrier, or if asynchronous instructions
  that read it were not waited for: another warp may still read it.
- The result of asynchronous instructions must not be used before they were waited for.
- An mbarrier must be initialized, fenced and followed by a barrier of all threads before it is used.  It must expect
  the bytes that are copied, and not wait for bytes that never come.
- When a layout conversion goes through shared memory, no copy or instruction may be in flight.
- A load or store must not lie outside a tensor, unless a mask excludes it.

Tensors are computed as a whole.  Layouts matter in inline assembly only, which is computed from the registers of each
lane, by the fragments and descriptors in the PTX manual (``gluon_ptx``).

Not covered: races through ordinary loads and stores, and the compiler's output (see ``gluon_offline``).
"""

from __future__ import annotations

import builtins
import dataclasses
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gluon_memory import MbarrierArray, Mbarriers, Program, Ring, Tiles
from gluon_ptx import LinearLayout, Registers, group, single
from gluon_values import Hazard, Pointer, Value, as_value, load, store
from slope_compile.kernels import gluon_products

__all__ = ["Executor", "Hazard"]

KERNELS = Path(gluon_products.__file__).parent


class Executor:
    """A module of Gluon kernels; ``executor.kernel[grid](*args, **options)`` launches one, as in Triton."""

    def __init__(self, module: str, mutations: tuple[tuple[str, str], ...] = ()) -> None:
        """``module``: its name, such as "gluon_mma_sp".  ``mutations``: (text, replacement) pairs, each applied once to
        the source of the module or of a module that it imports."""
        self.program = Program((0, 0))
        self.mutations = list(mutations)
        self.modules: dict[str, types.SimpleNamespace] = {}
        self.names = vars(self._module(module))
        assert not self.mutations, self.mutations

    def tiles(self, words: Tensor, rows: int, columns: int) -> Tiles:
        return Tiles(words, rows, columns)

    def __getattr__(self, name: str) -> Any:
        return _Launcher(self, self.names[name])

    def _module(self, name: str) -> types.SimpleNamespace:
        if name not in self.modules:
            path = KERNELS / f"{name}.py"
            source = path.read_text()
            for old, new in self.mutations[:]:
                if old in source:
                    source = source.replace(old, new, 1)
                    self.mutations.remove((old, new))
            names: dict[str, Any] = {"__builtins__": vars(builtins) | {"__import__": self._import}}
            exec(compile(source, str(path), "exec"), names)
            self.modules[name] = types.SimpleNamespace(**names)
        return self.modules[name]

    def _import(self, name: str, *rest: Any) -> Any:
        if name == "slope_compile.kernels._gluon":
            return self._names()
        if name.startswith("slope_compile.kernels."):
            return self._module(name.rpartition(".")[2])
        assert name.startswith("triton.experimental"), name
        gluon = types.SimpleNamespace(
            jit=lambda f=None, **options: f if f is not None else lambda kernel: kernel,
            constexpr_function=lambda f: f,
        )
        return types.SimpleNamespace(gluon=gluon, language=self._language())

    def _names(self) -> types.SimpleNamespace:
        """The module ``_gluon``.  Its lambdas look up ``self.program`` at each call: each program replaces it."""
        return types.SimpleNamespace(
            copy_async=lambda *a, **k: self.program.copy(*a, **k),
            commit_copies=lambda: self.program.commit(),
            wait_for_copies=lambda n: self.program.wait(n),
            barrier=lambda: self.program.barrier(),
            fence_async_shared=lambda: self.program.fence(),
            load_tile=self._load_tile,
            mbarrier=Mbarriers(),
            tiles=None,
        )

    def _language(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32,
            int16=torch.int16, int32=torch.int32, int64=torch.int64,
            constexpr=lambda value: value, static_range=range, assume=self._assume,
            BlockedLayout=lambda *a, **k: None, SliceLayout=lambda *a: None, SwizzledSharedLayout=lambda *a, **k: None,
            DistributedLinearLayout=LinearLayout,
            program_id=lambda axis: Value(self.program.ids[axis]),
            cdiv=lambda a, b: (a + b - 1) // b,
            minimum=lambda a, b: Value(torch.minimum(as_value(a).data, as_value(b).data)),
            where=lambda c, a, b: Value(torch.where(as_value(c).data, as_value(a).data, as_value(b).data)),
            arange=lambda start, stop, layout: Value(torch.arange(start, stop, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype)),
            expand_dims=lambda v, axis: Value(v.data.unsqueeze(axis)),
            permute=lambda v, order: Value(v.data.permute(*order)),
            split=lambda v: (Value(v.data[..., 0]), Value(v.data[..., 1])),
            sum=lambda v, axis: Value(v.data.sum(axis)),
            load=load, store=store, allocate_shared_memory=self._allocate,
            convert_layout=self._convert, inline_asm_elementwise=self._assembly,
        )  # fmt: skip

    @staticmethod
    def _assume(condition: Value) -> None:
        assert bool(condition.data), "a false assumption"

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Ring | MbarrierArray:
        if layout == Mbarriers.MBarrierLayout():
            return self.program.allocate_mbarriers(shape[0])
        return self.program.allocate(shape, layout)

    def _load_tile(self, *args: Any, **named: Any) -> None:
        self.program.load_tile(*args, **named)

    def _convert(self, value: Value, layout: Any, assert_trivial: bool = False) -> Value:
        if assert_trivial:
            self.program.layout = layout
        else:
            self.program.reuse_shared_memory()
        return value

    def _assembly(self, text: str, constraints: str, args: list[Value], dtype: Any, is_pure: bool, pack: int) -> Value:
        wait = re.fullmatch(r"wgmma\.wait_group\.sync\.aligned (\d+);", text)
        if wait:
            self.program.wait_for_multiplications(int(wait[1]))
            return Value(args[0].data)
        layout = self.program.layout
        registers = Registers(layout, pack, constraints, args)
        if text.startswith("{"):
            assert registers.tied
            assert not is_pure
            return group(text, registers, self.program, args[-1])
        single(text, registers)
        return Value(registers.tensor(layout))


@dataclasses.dataclass(frozen=True)
class _Launcher:
    executor: Executor
    kernel: Callable[..., None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int | None = None, **constants: Any) -> None:
            if "WN" in constants:
                assert num_warps == constants["WN"] * constants.get("WM", 1) * constants.get("WK", 1)
            given = [_argument(arg) for arg in args]
            for ids in _programs(grid):
                self.executor.program = Program(ids)
                self.kernel(*given, **constants)
                self.executor.program.end()

        return launch


def _argument(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return Pointer.to(arg)
    return arg if isinstance(arg, Tiles) or arg == 1 else Value(arg)  # Triton compiles a 1 in


def _programs(grid: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for y in range(grid[1] if len(grid) > 1 else 1):
        for x in range(grid[0]):
            yield x, y
