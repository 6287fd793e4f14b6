"""Shared memory of a Gluon kernel that runs on the CPU (``gluon_cpu``), with checks of its copies and barriers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gluon_values import Hazard, Pointer, Value, as_value, load


@dataclasses.dataclass(eq=False)
class Stage:
    """A part of shared memory that is copied to and read as a whole."""

    data: Tensor | None = None
    """The contents that all threads see; None if there are none, or threads may see different ones."""
    filling: bool = False
    """Whether a copy to it is in flight."""
    being_read: bool = False
    """By some thread since the last barrier."""
    readers: int = 0
    """Number of groups of asynchronous instructions in flight that read it."""

    def fill(self) -> None:
        if self.being_read or self.readers:
            raise Hazard("a stage is copied to that may still be read")
        if self.filling:
            raise Hazard("a stage is copied to twice at a time")
        self.data, self.filling = None, True

    def filled(self, data: Tensor) -> None:
        self.data, self.filling = data, False

    def visible(self) -> Tensor:
        if self.data is None:
            raise Hazard("a stage is read before its copy is there for all threads")
        return self.data


@dataclasses.dataclass
class Ring:
    """``gl.allocate_shared_memory``."""

    program: Program
    stages: list[Stage]
    shape: list[int]
    """Of a stage, in words."""
    layout: Any

    def index(self, i: Any) -> View:
        return View(self.program, self.stages[int(i)])

    def _keep_alive(self) -> None:
        pass


@dataclasses.dataclass
class View:
    program: Program
    stage: Stage

    def load(self, layout: Any) -> Value:
        data = self.stage.visible()
        self.stage.being_read = True
        return Value(data)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """``TensorDescriptor``: rectangles of a matrix of words, zeros outside."""

    words: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.words.data_ptr() % 16 or self.words.stride(0) * 4 % 16 or self.words.stride(1) != 1:
            raise Hazard("the TMA cannot read a matrix like this")

    @property
    def layout(self) -> int:
        """The swizzle in bytes, which is the length of a row."""
        return 4 * self.columns

    def at(self, row: int, column: int) -> Tensor:
        tile = torch.zeros(self.rows, self.columns, dtype=torch.int32)
        inside = self.words[row : row + self.rows, column : column + self.columns]
        tile[: inside.shape[0], : inside.shape[1]] = inside
        return tile


@dataclasses.dataclass(eq=False)
class Mbarrier:
    """Counts the bytes of copies, phase after phase."""

    state: str = "uninitialized"
    """Then "made", "fenced", "usable", "invalidated", "gone": each needs the one before."""
    phase: int = 0
    expected: int | None = None
    copies: list[tuple[Stage, Tensor]] = dataclasses.field(default_factory=list)
    waited: bool = False
    """By some thread since the last barrier of all threads."""

    def become(self, old: str, new: str) -> None:
        if self.state != old:
            raise Hazard(f"an mbarrier is {self.state} and should be {new}")
        self.state = new

    def use(self) -> None:
        self.become("usable", "usable")

    def expect(self, count: int) -> None:
        self.use()
        if self.expected is not None:
            raise Hazard("an mbarrier expects twice in a phase")
        self.expected = count

    def copy(self, stage: Stage, data: Tensor) -> None:
        self.use()
        if self.expected is None:
            raise Hazard("a copy is counted that nobody expects")
        stage.fill()
        self.copies.append((stage, data))

    def wait(self, parity: int) -> None:
        self.use()
        self.waited = True
        if self.phase % 2 != parity:
            return  # that of the phase before, which is over
        if self.expected != sum(data.numel() * 4 for _, data in self.copies):
            raise Hazard("a thread waits forever")
        for stage, data in self.copies:
            stage.filled(data)
        self.phase, self.expected, self.copies = self.phase + 1, None, []

    def invalidate(self) -> None:
        if self.expected is not None or self.waited:
            raise Hazard("an mbarrier is invalidated while it is in use")
        self.become("usable", "invalidated")


@dataclasses.dataclass
class MbarrierArray:
    mbarriers: list[Mbarrier]

    def index(self, i: Any) -> Mbarrier:
        return self.mbarriers[int(i)]


class Program:
    """The copies and instructions that one program has in flight."""

    def __init__(self, ids: tuple[int, int]) -> None:
        self.ids = ids
        self.rings: list[Ring] = []
        self.layout: Any = None  # of the operands of assembly
        self.mbarriers: list[Mbarrier] = []
        self.open: list[tuple[Stage, Tensor]] = []
        self.groups: list[list[tuple[Stage, Tensor]]] = []
        self.arrived: list[tuple[Stage, Tensor]] = []
        self.multiplications: list[tuple[list[Stage], Callable[[], None]]] = []

    def allocate(self, shape: list[int], layout: Any) -> Ring:
        ring = Ring(self, [Stage() for _ in range(shape[0])], shape[1:], layout)
        self.rings.append(ring)
        return ring

    def allocate_mbarriers(self, count: int) -> MbarrierArray:
        self.mbarriers += [Mbarrier() for _ in range(count)]
        return MbarrierArray(self.mbarriers[-count:])

    def copy(self, view: View, pointer: Pointer, mask: Any = None) -> None:
        view.stage.fill()
        self.open.append((view.stage, load(pointer, mask, 0).data))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            self.arrived += self.groups.pop(0)

    def barrier(self) -> None:
        for stage, data in self.arrived:
            stage.filled(data)
        self.arrived = []
        for ring in self.rings:
            for stage in ring.stages:
                stage.being_read = False
        for mbarrier in self.mbarriers:
            mbarrier.waited = False
            mbarrier.state = {"fenced": "usable", "invalidated": "gone"}.get(mbarrier.state, mbarrier.state)

    def fence(self) -> None:
        for mbarrier in self.mbarriers:
            if mbarrier.state == "made":
                mbarrier.state = "fenced"

    def load_tile(self, tiles: Tiles, at: list[Any], mbarrier: Mbarrier, view: View, pred: Any = True) -> None:
        if bool(as_value(pred).data):
            mbarrier.copy(view.stage, tiles.at(int(at[0]), int(at[1])))

    def issue(self, stages: list[Stage], compute: Callable[[], None]) -> None:
        """A group of asynchronous instructions that read ``stages``."""
        for stage in stages:
            stage.visible()
            stage.readers += 1
        self.multiplications.append((stages, compute))

    def wait_for_multiplications(self, outstanding: int) -> None:
        while len(self.multiplications) > outstanding:
            stages, compute = self.multiplications.pop(0)
            compute()
            for stage in stages:
                stage.readers -= 1
                stage.being_read = True  # other warps may still be at it

    def bytes_at(self, address: Tensor) -> tuple[Stage, Callable[[], Tensor]]:
        """The stage of the first ring to which byte addresses in shared memory belong, and the words there.

        Rows of 128 bytes, swizzled: the TMA exchanges the eight 16-byte pieces of a row by its number modulo 8.
        """
        ring = self.rings[0]
        size = ring.shape[0] * ring.shape[1] * 4
        which = (address // size).unique().tolist()
        if ring.layout != 128 or len(which) != 1 or not 0 <= which[0] < len(ring.stages):
            raise Hazard("shared memory is read elsewhere than in a stage of rows of 128 bytes")
        stage = ring.stages[which[0]]

        def words() -> Tensor:
            data = stage.visible()
            row, piece = torch.arange(data.shape[0])[:, None], torch.arange(8)
            memory = data.view(-1, 8, 4)[row, piece ^ (row % 8)].flatten()
            found: Tensor = memory[address % size // 4]
            return found

        return stage, words

    def reuse_shared_memory(self) -> None:
        stages = [stage for ring in self.rings for stage in ring.stages]
        busy = any(stage.filling or stage.being_read or stage.readers for stage in stages)
        if busy or self.open or self.groups or any(m.state != "gone" for m in self.mbarriers):
            raise Hazard("shared memory is reused while it is in use")

    def end(self) -> None:
        if self.multiplications or any(stage.filling for ring in self.rings for stage in ring.stages):
            raise Hazard("a program ends with something under way")


class Mbarriers:
    """``hopper.mbarrier``."""

    @staticmethod
    def MBarrierLayout() -> str:
        return "mbarriers"

    def init(self, mbarrier: Mbarrier, count: int) -> None:
        assert count == 1
        mbarrier.become("uninitialized", "made")

    def expect(self, mbarrier: Mbarrier, count: int, pred: Any = True) -> None:
        if bool(as_value(pred).data):
            mbarrier.expect(int(count))

    def wait(self, mbarrier: Mbarrier, phase: Any) -> None:
        mbarrier.wait(int(phase))

    def invalidate(self, mbarrier: Mbarrier) -> None:
        mbarrier.invalidate()
