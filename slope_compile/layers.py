"""Finding linear layers in a model tree: stock ones, prepared ones, and why some cannot be converted."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slope_compile._shared_classes import linear_forward
from slope_compile._storage import storage_key
from slope_compile.config import SlopeConfig
from slope_compile.parametrizations import LowRank, SparseWeight
from slope_compile.report import EXPERTS_DETAIL, Decision, Reason
from slope_compile.rules import first_linears, holds_experts, is_head, is_router, layer_path, plain_path

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A weight of a module that computes ``x W^T + b`` with it: ``[N, K]``, or ``[K, N]`` if ``transposed``."""

    path: str
    """The module's path; with the parameter's name behind it if that is not ``weight``."""
    module: nn.Module
    transposed: bool
    name: str = "weight"
    """The parameter's name in the module."""

    @property
    def weight(self) -> Tensor:
        """The tensor that is trained: the stored one, whatever parametrizations stand on it."""
        if parametrize.is_parametrized(self.module, self.name):
            stored: Any = self.module.parametrizations[self.name]  # type: ignore[index]
            if "original" in stored._parameters:  # not where several tensors make the weight (weight_norm)
                original = stored.original
                assert isinstance(original, Tensor)
                return original
        weight = getattr(self.module, self.name)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        sparse = self.sparse
        if sparse is not None:
            return sparse.shape
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def parametrizations(self) -> list[nn.Module]:
        """Parametrizations on the weight, in the order in which they apply."""
        if not parametrize.is_parametrized(self.module, self.name):
            return []
        return list(self.module.parametrizations[self.name])  # type: ignore[index]

    @property
    def sparse(self) -> SparseWeight | None:
        """Our compressed storage, if the layer is prepared."""
        return next((p for p in self.parametrizations if isinstance(p, SparseWeight)), None)

    @property
    def low_rank(self) -> LowRank | None:
        """Our adapter, if the layer has one."""
        return next((p for p in self.parametrizations if isinstance(p, LowRank)), None)


ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""What ``nn.MultiheadAttention`` projects its input with: the first, or the three others."""


def linear_layers(model: nn.Module) -> Iterator[LinearLayer]:
    """Every linear layer under its first path, in order of registration.

    These are ``nn.Linear``, Hugging Face's ``Conv1D``, and the input projections of ``nn.MultiheadAttention`` (its
    output projection is an ``nn.Linear``).
    """
    conv1d = _conv1d_class()
    for name, module in model.named_modules():
        path = plain_path(name)
        if isinstance(module, nn.Linear):
            yield LinearLayer(path, module, transposed=False)
        elif conv1d is not None and isinstance(module, conv1d):
            yield LinearLayer(path, module, transposed=True)
        elif isinstance(module, nn.MultiheadAttention):
            for weight in ATTENTION_WEIGHTS:
                if module._parameters.get(weight) is not None or parametrize.is_parametrized(module, weight):
                    yield LinearLayer(f"{path}.{weight}".lstrip("."), module, transposed=False, name=weight)


def decide(
    model: nn.Module, config: SlopeConfig, adapters_stay: bool = False
) -> list[tuple[LinearLayer, Decision]]:
    """Which layers become sparse, by the rules of the method and the configuration; nothing is changed.

    ``adapters_stay``: a weight that has nothing but our adapter on it counts as a plain one (way A).
    """
    layers = list(linear_layers(model))
    users = _weight_users(model)
    paths = collections.Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    first = first_linears([layer.path for layer in layers]) if config.first_dense else set()
    modules = {plain_path(path): module for path, module in model.named_modules()}
    tables = [module for module in modules.values() if isinstance(module, nn.Embedding)]
    # A square table holds positions: were it the vocabulary, every square projection would count as a head.
    vocabularies = frozenset(t.num_embeddings for t in tables if t.num_embeddings != t.embedding_dim)

    def judge(layer: LinearLayer) -> tuple[Reason, str]:
        N, K = layer.shape
        settings = config.layer(layer.path)
        weight = layer.weight
        if layer.parametrizations and not (adapters_stay and layer.parametrizations == [layer.low_rank]):
            names = ", ".join(type(p).__name__ for p in layer.parametrizations)
            return Reason.PARAMETRIZED, f"{names}; remove it before converting"
        if type(weight) is not nn.Parameter:
            return Reason.SUBCLASS, type(weight).__name__
        if paths[id(layer.module)] > 1:
            return Reason.SHARED, f"the module has {paths[id(layer.module)]} paths"
        names_of_weight = users[storage_key(weight)]
        if len(names_of_weight) > 1:
            return Reason.TIED, " and ".join(names_of_weight)
        if not config.selects(layer.path):
            return Reason.EXCLUDED, ""
        if layer.path in first:
            return Reason.FIRST, ""
        if config.heads_dense and is_router(layer.path, modules):
            return Reason.ROUTER, ""
        if config.heads_dense and is_head(layer.path, N, vocabularies, layer is layers[-1]):
            return Reason.HEAD, ""
        # A forward set on the instance (a hook of another library) may be any callable, not a bound method.
        if getattr(layer.module.forward, "__func__", None) not in _known_forwards():
            return Reason.FORWARD_REPLACED, type(layer.module).__name__
        if weight.dtype not in DTYPES:
            return Reason.DTYPE, str(weight.dtype)
        if K % settings.pattern.group or not N or not K:
            return Reason.SHAPE, f"K = {K} is not a positive multiple of {settings.pattern.group}"
        if settings.double_pruned and N % settings.pattern.group:
            return Reason.SELECTED, f"exact backward, as N = {N} is not a multiple of {settings.pattern.group}"
        return Reason.SELECTED, ""

    decisions = []
    for layer in layers:
        reason, detail = judge(layer)
        settings = config.layer(layer.path)
        sparse = reason is Reason.SELECTED
        exact = not settings.double_pruned or layer.shape[0] % settings.pattern.group
        decision = Decision(
            weight=layer.path,
            sparse=sparse,
            reason=reason,
            shape=layer.shape,
            pattern=str(settings.pattern) if sparse else "",
            backward=("exact" if exact else "double_pruned") if sparse else "",
            detail=detail,
        )
        decisions.append((layer, decision))
    return decisions


def mixture_weights(model: nn.Module) -> list[Decision]:
    """Decisions about mixtures of experts without linears: the experts' weights in one tensor, and the router's."""
    linears = {layer.path for layer in linear_layers(model)}
    modules = [plain_path(name) for name, _ in model.named_modules()]
    decisions = []
    for name, parameter in model.named_parameters():
        path, shape = layer_path(plain_path(name)), tuple(parameter.shape)
        if holds_experts(path, shape):
            decisions.append(Decision(path, False, Reason.EXPERTS, shape, detail=EXPERTS_DETAIL))
        elif len(shape) == 2 and path not in linears and is_router(path, modules):
            decisions.append(Decision(path, False, Reason.ROUTER, shape))
    return decisions


def _weight_users(model: nn.Module) -> dict[int, list[str]]:
    """The key of each storage -> the names under which parameters with that storage are registered."""
    users: dict[int, list[str]] = collections.defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[storage_key(parameter)].append(name)
    return users


def _conv1d_class() -> type[nn.Module] | None:
    """Hugging Face's Conv1D, if transformers has been imported (a model that contains one has done so)."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def _known_forwards() -> tuple[object, ...]:
    """Forward functions that read ``self.weight`` as a linear does."""
    conv1d = _conv1d_class()
    known = (nn.Linear.forward, nn.MultiheadAttention.forward, linear_forward)
    return known + ((conv1d.forward,) if conv1d is not None else ())
