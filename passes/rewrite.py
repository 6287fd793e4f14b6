"""The base class of the passes that change a graph: they work region by region and count changes in the report."""

from __future__ import annotations

import abc
from typing import ClassVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from slope_compile.passes.context import Context
from slope_compile.passes.graph import Region, recompile, regions


class Rewrite(PassBase, abc.ABC):
    """A pass that rewrites a graph and the bodies of its higher-order operators, callers first.

    A subclass says in :meth:`rewrite` what it does to one of them; its module's docstring has the pattern.
    """

    name: ClassVar[str]
    """In the report, and in the option ``fusions`` where the pass is one."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @abc.abstractmethod
    def rewrite(self, region: Region) -> int:
        """Rewrite one region's graph; how many places were changed."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite every region."""
        found = regions(graph_module)
        changes = sum(self.rewrite(region) for region in found)
        recompile(found)
        self.context.report.count(self.name, changes)
        return PassResult(graph_module, changes > 0)
