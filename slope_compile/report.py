"""What was decided for each linear, and why: the record that conversions and passes fill in."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator

from slope_compile.config import LayerConfig

ACCELERATED = "2:4"
"""The pattern that has kernels."""


EXPERTS_DETAIL = "2:4 products take one matrix at a time; experts that are linears of their own become sparse"


class Reason(enum.Enum):
    """Why a linear is sparse, or why it was left dense.  The value is the text a reader sees."""

    SELECTED = "selected"
    PREPARED = "prepared by sparsify_"
    ALREADY_SPARSE = "already rewritten"
    FIRST = "first linear after the input"
    HEAD = "output head"
    ROUTER = "router of a mixture of experts"
    EXPERTS = "weights of several experts in one tensor"
    EXCLUDED = "excluded by the configuration"
    TIED = "weight is tied to another parameter or module"
    SHARED = "module or weight is used more than once"
    SHAPE = "shape does not divide"
    DTYPE = "dtype is not supported"
    COMPUTED = "weight is computed, not a parameter"
    FROZEN = "weight is frozen, a constant of the graph"
    BARE = "matrix product with a parameter that no linear layer owns"
    NOT_CONSTANT = "weight is a graph input without a parameter behind it"
    PARAMETRIZED = "weight has a parametrization that is not ours"
    SUBCLASS = "weight is a tensor subclass"
    FORWARD_REPLACED = "module's forward is not that of a known linear"
    FUSED_OPERATOR = "inside a fused operator of PyTorch"
    HIGHER_ORDER = "inside a higher-order operator that passes do not enter"
    EAGER = "in no graph"
    UNPROFITABLE = "predicted slower than dense"


WAYS_OUT = {
    Reason.FIRST: "first_dense=False in the SlopeConfig",
    Reason.HEAD: "heads_dense=False in the SlopeConfig",
    Reason.ROUTER: "heads_dense=False in the SlopeConfig",
    Reason.EXPERTS: "a model whose experts are linears of their own",
    Reason.EXCLUDED: "include and exclude in the SlopeConfig",
    Reason.TIED: "untie the weight (transformers: tie_word_embeddings=False)",
    Reason.SHARED: "a module of its own for each place",
    Reason.SHAPE: "pad the features, or choose a pattern whose group divides them",
    Reason.DTYPE: "convert the weight to float32, bfloat16, float16 or float64",
    Reason.COMPUTED: "multiply with the parameter itself, or give the part a linear of its own",
    Reason.FROZEN: "sparsify_ the model first, or compile it without freezing",
    Reason.BARE: "name it in include, use F.linear, or make it the weight of an nn.Linear",
    Reason.NOT_CONSTANT: "make the weight a Parameter of the model",
    Reason.PARAMETRIZED: "remove the parametrization before converting",
    Reason.SUBCLASS: "convert before the weight is wrapped (sharded, quantized)",
    Reason.FORWARD_REPLACED: "convert before the module's forward is replaced, or use a stock nn.Linear",
    Reason.FUSED_OPERATOR: "torch.backends.mha.set_fastpath_enabled(False)",
    Reason.HIGHER_ORDER: "call the layer outside of the operator",
    Reason.EAGER: "TORCH_LOGS=graph_breaks says why; block.compile(backend=\"slope\") gives a block graphs of its own",
    Reason.UNPROFITABLE: "leave the option 'device' out",
}
"""What to change so that a linear that was left dense for a reason becomes sparse."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """One linear: ``weight`` is its module path where known, else the graph's name for the weight."""

    weight: str
    sparse: bool
    reason: Reason
    shape: tuple[int, ...] = ()
    """``(N, K)`` = (out_features, in_features)."""
    pattern: str = ""
    backward: str = ""
    node: str = ""
    """Name of the graph node, when the decision was made on a graph."""
    detail: str = ""
    """What exactly, and the way out: "K = 30 is not a multiple of 4"."""

    @property
    def why(self) -> str:
        """Reason and detail as one text."""
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value

    @property
    def way_out(self) -> str:
        """What makes it sparse; "" for one that is."""
        return "" if self.sparse else WAYS_OUT[self.reason]


def ways_out(reasons: Iterable[Reason]) -> list[str]:
    """A line for each reason to stay dense."""
    return [f"{reason.value}: to change it, {WAYS_OUT[reason]}" for reason in dict.fromkeys(reasons)]


def decision_about(
    path: str, shape: tuple[int, int], settings: LayerConfig, reason: Reason, detail: str = "", node: str = ""
) -> Decision:
    """The decision about a layer with these settings: sparse if the reason is ``SELECTED``.

    Args:
        path: module path.
        shape: ``(N, K)``.
        node: name of the graph node, if there is a graph.
    """
    if reason is not Reason.SELECTED:
        return Decision(path, False, reason, shape, node=node, detail=detail)
    backward = "double_pruned" if settings.double_prunes(shape[0]) else "exact"
    return Decision(path, True, reason, shape, str(settings.pattern), backward, node, detail)


@dataclasses.dataclass
class Report:
    """Decisions in order, and the number of changes each pass made."""

    decisions: list[Decision] = dataclasses.field(default_factory=list)
    changes: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def count(self, name: str, changes: int) -> None:
        """Note that the pass of that name made so many changes."""
        self.changes[name] = self.changes.get(name, 0) + changes

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    @property
    def sparse(self) -> list[Decision]:
        """Decisions for the linears that are sparse."""
        return [d for d in self.decisions if d.sparse]

    @property
    def dense(self) -> list[Decision]:
        """Decisions for the linears that were left dense."""
        return [d for d in self.decisions if not d.sparse]

    def __str__(self) -> str:
        from tabulate import tabulate  # Nothing else that a training job imports needs it.

        rows = [
            (d.weight, "x".join(map(str, d.shape)), d.pattern if d.sparse else "dense", d.backward, d.why)
            for d in self.decisions
        ]
        table = tabulate(rows, headers=("weight", "N x K", "pattern", "backward", "reason"), disable_numparse=True)
        lines = [table, f"{len(self.sparse)} of {len(self)} linears sparse"]
        lines += ways_out(d.reason for d in self.dense)
        others = sorted({d.pattern for d in self.sparse} - {ACCELERATED, ""})
        if others:
            lines.append(
                f"{', '.join(others)}: kernels exist for {ACCELERATED} alone; products with other patterns run dense "
                "on the expanded weight, so memory is saved but no time"
            )
        return "\n".join(lines)
