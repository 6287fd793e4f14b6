"""The pipeline: the passes in order, checked after each, and their report."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from slope_compile.errors import SlopeError
from slope_compile.passes.context import Context
from slope_compile.passes.decompose import Decompose
from slope_compile.passes.fuse import Fuse
from slope_compile.passes.fuse_low_rank import FuseLowRank
from slope_compile.passes.fuse_siblings import FuseSiblings
from slope_compile.passes.graph import regions
from slope_compile.passes.low_rank import DistributeLowRank
from slope_compile.passes.normalize import Normalize
from slope_compile.passes.select import Select
from slope_compile.passes.sparsify import Sparsify

PIPELINE = (
    Decompose,  # linears out of the operators that hide them
    Normalize,  # one form for every spelling, so that later passes handle only that one
    Select,  # all decisions before any change of a weight
    DistributeLowRank,  # adapters away from the weight, which leaves a plain base for the next pass
    Sparsify,  # compressed weights and their products
    Fuse,  # what now stands side by side
    FuseSiblings,
    FuseLowRank,  # last: it takes the sum apart that the others leave alone
)

FUSIONS = (Fuse.name, FuseSiblings.name, FuseLowRank.name)
"""Passes that change how a result is computed, not the result: they can be switched on and off by name."""


def run_passes(graph_module: GraphModule, context: Context) -> GraphModule:
    """Rewrite a graph in place; ``context.report`` then holds the decisions.  Of the fusions, those in
    ``context.fusions`` run.

    Raises:
        SlopeError: whatever a pass raised on purpose.
    """
    passes: list[Callable[..., PassResult | None]] = [
        make(context) for make in PIPELINE if make.name in context.fusions or make.name not in FUSIONS
    ]
    manager = PassManager(passes, run_checks_after_each_pass=True)
    manager.add_checks(_check)
    try:
        result = manager(graph_module)
    except Exception as error:
        # PassManager wraps whatever a pass raises; a message meant for the user must reach the user.
        if isinstance(error.__cause__, SlopeError):
            raise error.__cause__ from error.__cause__.__cause__
        raise
    module = result.graph_module
    assert isinstance(module, GraphModule)
    return module


def _check(module: object) -> None:
    """Every region is a valid graph between passes."""
    assert isinstance(module, GraphModule)
    for region in regions(module):
        region.graph.lint()
