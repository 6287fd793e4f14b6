"""Warnings about prepared layers that run in Python although something around them is compiled.

Dynamo leaves code around graph breaks to Python (for example the whole of a checkpointed block that has a break
inside).  The backend never sees this code.  The layer still computes the right result, with its weight expanded to a
dense one, but more slowly.  The weight's parametrization runs in both cases and so can detect it.
"""

from __future__ import annotations

import dataclasses
import re

from slope_compile._compiled_call import in_compiled_call
from slope_compile.log import log
from slope_compile.report import WAYS_OUT, Reason


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a prepared weight is."""

    path: str
    """Module path of the layer in the model that ``sparsify_`` was given."""
    said: set[str]
    """The kinds of layers that a message has named; one set for the whole model."""

    @property
    def kind(self) -> str:
        """The path without its numbers: the same in all blocks."""
        return re.sub(r"\d+", "#", self.path)


def in_python(place: Place) -> None:
    """Logs the first layer of each kind, inside compiled calls only.

    The parametrization calls this when Python code expands its weight.  A validation run of the model that was not
    compiled, or reading ``layer.weight``, is meant to run in Python.
    """
    if place.kind in place.said or not in_compiled_call():
        return
    place.said.add(place.kind)
    log.warning(
        "compiled call: the prepared layer %r (and its like in other blocks, if they do) runs in Python, outside of "
        "every graph, with its weight expanded; %s",
        place.path, WAYS_OUT[Reason.EAGER],
    )  # fmt: skip


def without_product(path: str) -> None:
    """Logs that a graph expands a weight and has no product: Dynamo has left the multiplication to Python.

    One graph serves all blocks that are alike, so there is one message for all of them.
    """
    log.warning(
        "compiled call: the prepared layer %r (and its like in other blocks) multiplies in Python, outside of every "
        "graph, with its weight expanded; %s",
        path, WAYS_OUT[Reason.EAGER],
    )  # fmt: skip
