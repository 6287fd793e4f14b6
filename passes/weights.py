"""The interface through which passes read a graph's weights and get compressed ones.

It hides whether a graph came from Dynamo (weights are inputs), from ``torch.export`` (weights are inputs described by a
signature) or is a plain GraphModule (weights are attributes).  There is a :class:`WeightStore` for each.
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
        """The decision by the rules for a whole model; None if only the graph is known."""
        ...

    def owned(self, node: Node) -> bool:
        """Whether a linear layer owns the parameter, going by its name; True where only the graph is known."""
        ...

    def router(self, node: Node) -> bool:
        """Whether the layer chooses among the experts of a mixture, judged by the names around it."""
        ...

    def compressed(self, node: Node, layer: LayerConfig, transposed: bool, before: Node) -> CompressedWeight:
        """Bring a dense weight into compressed form, with nodes that are available at ``before``.

        Called once for each selected weight, after all decisions have been made.
        """
        ...

    def pruned(self, node: Node, layer: LayerConfig, transposed: bool) -> bool:
        """Prune a dense weight in place and keep it pruned, for products that read it in its dense form.

        Called instead of :meth:`compressed`.

        Returns:
            False if the weight cannot be kept pruned; nothing is done then.
        """
        ...
