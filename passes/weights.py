"""Where a graph's weights live: what passes may ask about a weight node, and how they get a compressed one.

Passes do not know whether a graph came from Dynamo (weights are inputs), from ``torch.export`` (weights are inputs
described by a signature) or is a plain GraphModule (weights are attributes).  A :class:`WeightStore` answers for each.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor
from torch.fx import Node

from slope_compile.config import LayerConfig
from slope_compile.report import Decision


@dataclasses.dataclass(frozen=True)
class CompressedWeight:
    """Nodes of the root graph that hold one weight in compressed form."""

    values: Node
    pattern: Node
    column_mask: Node | None = None


class WeightStore(Protocol):
    """The weights of one root graph.  Nodes given and returned belong to that graph."""

    def tensor(self, node: Node) -> Tensor | None:
        """The parameter behind a node, with real values; None for anything that is not a parameter."""
        ...

    def path(self, node: Node) -> str:
        """Module path of the layer that owns the weight (``h.0.mlp.c_fc``), or the graph's own name for it."""
        ...

    def ruling(self, node: Node) -> Decision | None:
        """What the rules say with the whole model at hand; None where only the graph is known."""
        ...

    def owned(self, node: Node) -> bool:
        """Whether a linear layer owns the parameter, going by its name; True where only the graph is known."""
        ...

    def router(self, node: Node) -> bool:
        """Whether the layer chooses among the experts of a mixture, going by the names around it."""
        ...

    def compressed(self, node: Node, layer: LayerConfig, transposed: bool, before: Node) -> CompressedWeight:
        """Bring a dense weight into compressed form, with nodes that are available at ``before``.

        Called once for each selected weight, after all decisions have been made.
        """
        ...

    def pruned(self, node: Node, layer: LayerConfig, transposed: bool) -> bool:
        """Prune a dense weight where it lies, and keep it so, for products that read it as it is; False where that
        cannot be promised.

        Called instead of :meth:`compressed`.
        """
        ...
