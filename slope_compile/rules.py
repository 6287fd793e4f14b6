"""The rules that need only names, shapes and dtypes: what is an output head, what reads the first input, what divides.

SLoPe makes every linear of attention and MLP sparse except output heads and the first linear after the input
(arXiv 2405.16325; for BERT that is layer 0's query, key and value together).  A model tree has no dataflow, so there
the rules use module paths; ``passes.select`` uses the dataflow where it has a whole graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from slope_compile.config import LayerConfig
from slope_compile.dtypes import DTYPES
from slope_compile.report import Reason

HEAD_NAMES = frozenset(
    {
        *("lm_head", "head", "heads", "classifier", "classification_head", "score", "qa_outputs", "seq_relationship"),
        *("decoder", "embed_out", "proj_out", "output", "output_projection", "output_layer"),
        *("logits", "to_logits", "unembed", "unembedding", "vocab_proj"),
    }
)
"""Last components of a module path that name an output head in common model code."""

ROUTER_NAMES = frozenset({"gate", "router", "gating", "gate_network", "shared_expert_gate", "wg"})
"""Components of a module path that name, beside ``experts``, what chooses among them."""

_QKV = re.compile(r"(^|_)(q|k|v|qkv|query|key|value)($|_)|^w(q|k|v)$")
_OUT = re.compile(r"^(o|out|output)(_proj|_projection)?$|^wo$")
_PARAMETRIZED = re.compile(r"^(?:(?P<module>.*)\.)?parametrizations\.(?P<parameter>\w+)\.(original|\d+\..*)$")


def is_head(path: str, N: int, vocabularies: frozenset[int], last: bool) -> bool:
    """Whether the linear at ``path`` with ``N`` out_features is an output head.

    Args:
        path: module path.
        N: out_features.
        vocabularies: row counts of the model's embeddings.
        last: whether it is the last linear of the model.

    True when its name is one of ``HEAD_NAMES``, or when it stands outside every repeated block (its path has no number
    followed by further names) and is the model's last linear or produces one feature per row of an embedding.  Inside
    blocks the number of features is no evidence (a position table often has as many rows as the model has features),
    nor is the name "output" (RWKV's ``blocks.3.attention.output``); both together are.
    """
    name, per_row = path.rpartition(".")[2], N in vocabularies
    if in_block(path):
        return name in HEAD_NAMES and (per_row or name != "output")
    return name in HEAD_NAMES or last or per_row


def fits(dtype: torch.dtype, shape: tuple[int, int], settings: LayerConfig) -> tuple[Reason, str]:
    """Whether a weight of this dtype and ``shape`` (N, K) can become sparse.

    Returns:
        ``SELECTED`` or the reason why not, and the detail.
    """
    N, K = shape
    group = settings.pattern.group
    if dtype not in DTYPES:
        return Reason.DTYPE, str(dtype)
    if K % group or not N or not K:
        return Reason.SHAPE, f"K = {K} is not a positive multiple of {group}"
    if settings.double_pruned and not settings.double_prunes(N):
        return Reason.SELECTED, f"exact backward, as N = {N} is not a multiple of {group}"
    return Reason.SELECTED, ""


def is_router(path: str, names: Iterable[str]) -> bool:
    """Whether the linear at ``path`` chooses among experts: ``mlp.gate`` where there is an ``mlp.experts``.

    Args:
        path: module path.
        names: paths of the model's modules or parameters.
    """
    parts = path.split(".")
    experts = [".".join([*parts[:i], "experts"]) for i, part in enumerate(parts) if part in ROUTER_NAMES]
    return bool(experts) and any(n == e or n.startswith(f"{e}.") for n in names for e in experts)


def holds_experts(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter, by its name and shape, holds the weights of several experts, ``[E, N, K]``."""
    return len(shape) == 3 and shape[0] > 1 and "expert" in path.lower()


def layer_path(parameter: str) -> str:
    """The path under which a weight is decided about, from the parameter's name and through any parametrization.

    It is the module's path for a parameter called ``weight``, and the parameter's own name for any other
    (``self_attn.in_proj_weight``): a module can have several.
    """
    match = _PARAMETRIZED.match(parameter)
    if match:
        parameter = ".".join(filter(None, (match["module"], match["parameter"])))
    module, _, name = parameter.rpartition(".")
    return module if name == "weight" else parameter


def plain_path(path: str) -> str:
    """The path without the steps into wrappers that ``torch.compile(block)`` put in place of a block."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def in_block(path: str) -> bool:
    """Whether the path leads through a numbered block: ``layers.3.mlp.up`` does, ``net.4`` does not."""
    return any(part.isdecimal() for part in path.split(".")[:-1])


def first_linears(paths: list[str]) -> set[str]:
    """The first linear of ``paths`` (in order of registration), and its query/key/value siblings.

    An output projection that was registered before its siblings is not the first.
    """
    if not paths:
        return set()
    parent, _, name = paths[0].rpartition(".")
    siblings = [p.rpartition(".")[2] for p in paths if p.rpartition(".")[0] == parent]
    if not _QKV.search(name) and not (_OUT.search(name) and any(map(_QKV.search, siblings))):
        return {paths[0]}
    return {p for p in paths if p.rpartition(".")[0] == parent and _QKV.search(p.rpartition(".")[2])}
