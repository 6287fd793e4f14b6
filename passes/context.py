"""What the passes of one run share: the configuration, the weights, the report, and the stored column masks."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from slope_compile.config import SlopeConfig
from slope_compile.cost import Device
from slope_compile.passes.weights import WeightStore
from slope_compile.pattern import Pattern
from slope_compile.report import Report


@dataclasses.dataclass(frozen=True)
class ColumnSite:
    """A stored column mask that somebody has to refresh between optimizer steps; nodes of the root graph."""

    values: Node
    pattern: Node
    column_mask: Node
    column_age: Node
    nm: Pattern
    interval: int


@dataclasses.dataclass
class Context:
    """Made anew for every graph."""

    config: SlopeConfig
    weights: WeightStore
    fusions: frozenset[str]
    """Names of the fusions that are on; *fuse_siblings* is off until asked for: on a CPU it was measured to gain
    nothing (0.99), on a GPU it has not been measured."""
    report: Report = dataclasses.field(default_factory=Report)
    columns: list[ColumnSite] = dataclasses.field(default_factory=list)
    device: Device | None = None
    """Where given, *select* refuses dense linears whose rewrite is predicted slower on it."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The note that *select* leaves on a linear node which becomes sparse."""

    path: str
