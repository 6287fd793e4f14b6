"""Prepared layers that run in Python although something around them is compiled: said once, not just slow.

Dynamo leaves code to Python around graph breaks (all of a checkpointed block, for one, that has a break inside).  The
backend never sees what is in there, and the layer still computes the right thing, with its weight expanded to a dense
one.  So it is the weight that notices.
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
    """Of its layer in the model that ``sparsify_`` was given."""
    said: set[str]
    """Of the whole model: the kinds that a message has named."""

    @property
    def kind(self) -> str:
        """The path without its numbers: the same in all blocks."""
        return re.sub(r"\d+", "#", self.path)


def in_python(place: Place) -> None:
    """Called where Python code expands a weight; of a kind the first layer is named, and only within compiled calls.

    A validation run of the model itself, and a look at ``layer.weight``, are meant to run there.
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
    """Called for a graph that expands a weight and has no product: what Dynamo leaves to Python around it multiplies.

    One graph serves all blocks that are alike, so nothing is said twice.
    """
    log.warning(
        "compiled call: the prepared layer %r (and its like in other blocks) multiplies in Python, outside of every "
        "graph, with its weight expanded; %s",
        path, WAYS_OUT[Reason.EAGER],
    )  # fmt: skip
