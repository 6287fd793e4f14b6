"""Finding linear layers in a model tree: stock ones, prepared ones, and why some cannot be converted."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from slope_compile._module_state import holds_parameter
from slope_compile._shared_classes import linear_forward
from slope_compile._storage import storage_key
from slope_compile.config import SlopeConfig
from slope_compile.parametrizations import LowRank, SparseWeight
from slope_compile.report import EXPERTS_DETAIL, Decision, Reason, decision_about
from slope_compile.rules import first_linears, fits, holds_experts, is_head, is_router, layer_path, plain_path


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
            if holds_parameter(stored, "original"):  # not where several tensors make the weight (weight_norm)
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
"""Input projections of ``nn.MultiheadAttention``: a module has the first, or the three others."""


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
                if holds_parameter(module, weight) or parametrize.is_parametrized(module, weight):
                    yield LinearLayer(f"{path}.{weight}".lstrip("."), module, transposed=False, name=weight)


def decide(
    model: nn.Module, config: SlopeConfig, adapters_stay: bool = False
) -> list[tuple[LinearLayer, Decision]]:
    """Which layers become sparse, by the rules of the method and the configuration; nothing is changed.

    ``adapters_stay``: a weight that has nothing but our adapter on it counts as a plain one (way A).
    """
    layers = list(linear_layers(model))
    judge = _Judge(model, config, layers, adapters_stay)
    return [
        (layer, decision_about(layer.path, layer.shape, config.layer(layer.path), *judge(layer))) for layer in layers
    ]


class _Judge:
    """Gives the reason, and its detail, for each layer; facts about the whole model are gathered once."""

    def __init__(
        self, model: nn.Module, config: SlopeConfig, layers: list[LinearLayer], adapters_stay: bool
    ) -> None:
        self.config = config
        self.adapters_stay = adapters_stay
        self.users = _weight_users(model)
        self.paths = collections.Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self.first = first_linears([layer.path for layer in layers]) if config.first_dense else set()
        self.last = layers[-1] if layers else None
        self.modules = {plain_path(path): module for path, module in model.named_modules()}
        tables = [module for module in self.modules.values() if isinstance(module, nn.Embedding)]
        # A square table holds positions: were it the vocabulary, every square projection would count as a head.
        self.vocabularies = frozenset(t.num_embeddings for t in tables if t.num_embeddings != t.embedding_dim)

    def __call__(self, layer: LinearLayer) -> tuple[Reason, str]:
        weight, path, config = layer.weight, layer.path, self.config
        if layer.parametrizations and not (self.adapters_stay and layer.parametrizations == [layer.low_rank]):
            names = ", ".join(type(p).__name__ for p in layer.parametrizations)
            return Reason.PARAMETRIZED, f"{names}; remove it before converting"
        if type(weight) is Tensor:
            return Reason.COMPUTED, "a hook makes it from other parameters (prune.remove ends torch.nn.utils.prune)"
        if type(weight) is not nn.Parameter:
            return Reason.SUBCLASS, type(weight).__name__
        if self.paths[id(layer.module)] > 1:
            return Reason.SHARED, f"the module has {self.paths[id(layer.module)]} paths"
        users = self.users[storage_key(weight)]
        if len(users) > 1:
            return Reason.TIED, " and ".join(users)
        if not config.selects(path):
            return Reason.EXCLUDED, ""
        if path in self.first:
            return Reason.FIRST, ""
        if config.heads_dense and is_router(path, self.modules):
            return Reason.ROUTER, ""
        if config.heads_dense and is_head(path, layer.shape[0], self.vocabularies, layer is self.last):
            return Reason.HEAD, ""
        # A forward set on the instance (a hook of another library) may be any callable, not a bound method.
        if getattr(layer.module.forward, "__func__", None) not in _known_forwards():
            return Reason.FORWARD_REPLACED, type(layer.module).__name__
        return fits(weight.dtype, layer.shape, config.layer(path))


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
