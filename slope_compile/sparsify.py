"""``sparsify_`` and ``densify_``: a model's linear layers to and from compressed parameters, in place."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slope_compile._module_state import put_first
from slope_compile._shared_classes import adapt, share, unshare
from slope_compile.config import LayerConfig, SlopeConfig, checked_config
from slope_compile.distributed import data_parallel
from slope_compile.errors import ConversionError
from slope_compile.kernels import cpu_library
from slope_compile.layers import ATTENTION_WEIGHTS, LinearLayer, decide, linear_layers, mixture_weights
from slope_compile.log import log
from slope_compile.optimizers import check_loaded_state, optimizers_with_state
from slope_compile.outside import Place
from slope_compile.parametrizations import LowRank, SparseWeight, choose_pattern, draw_adapter
from slope_compile.report import Decision, Report


class DenseNote:
    """Stands in for ``extra_repr`` of a layer that was left dense, so that ``print(model)`` says why."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self) -> str:
        return self.text


class _ShowsNote:
    """Mixin for a layer's class with a ``__repr__`` of its own that does not call ``extra_repr``."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """To pickle and to copy: the class cannot be found by name."""
        return _blank_showing_note, (type(self).__mro__[2],), self.__dict__

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}, {self.__dict__['extra_repr']()})"


@functools.cache
def _showing_note(layer_class: type[nn.Module]) -> type[nn.Module]:
    """One class for all layers of a class, so that a graph which Dynamo compiled for one block serves the others."""
    name, module = layer_class.__name__, layer_class.__module__
    return type(name, (_ShowsNote, layer_class), {"__module__": module, "__qualname__": layer_class.__qualname__})


def _blank_showing_note(layer_class: type[nn.Module]) -> nn.Module:
    return layer_class.__new__(_showing_note(layer_class))  # type: ignore[arg-type]  # "not Hashable"


def sparsify_(model: nn.Module, config: SlopeConfig | None = None) -> Report:
    """Convert a model's linear layers to N:M sparse weights with compressed parameters, in place.

    The weight Parameter of each selected layer keeps its identity and becomes ``values [N, K keep/group]``; so do its
    gradient and any elementwise optimizer's state.  Call it after the model has its initial weights and is on its
    device, and before the optimizer's first step.

    Eager execution computes the exact input gradient; with ``backward="double_pruned"`` the twice pruned weight is
    used by ``torch.compile(model, backend="slope")``.

    Args:
        model: any module; layers are ``nn.Linear``, Hugging Face's ``Conv1D`` and the projections of
            ``nn.MultiheadAttention``.
        config: what and how; the default is 2:4 with random masks on everything but first linear and heads.

    Returns:
        A report with one decision per linear layer (and per tensor that holds several experts, which stays dense);
        ``print(report)`` shows it as a table.

    Raises:
        ConversionError: the model is prepared already, has parameters on the meta device, pending gradients or
            optimizer state, is wrapped in DistributedDataParallel, or has no eligible layer.  Nothing has been changed
            then.
        ConfigError, TypeError: ``config`` is no SlopeConfig, ``model`` no module.
    """
    config = checked_config("sparsify_", config)
    _check_module("sparsify_", model)
    _check_not_prepared(model)
    decisions = decide(model, config)
    chosen = [(layer, config.layer(layer.path)) for layer, decision in decisions if decision.sparse]
    if not chosen:
        reasons = [f"  {d.weight or 'the model'}: {d.why}" for _, d in decisions]
        unused = config.unused([d.weight for _, d in decisions])
        reasons += [f"  {rule} matches no linear layer" for rule in unused if decisions]
        listed = "\n".join(reasons or ["  it has no linear layers"])
        raise ConversionError(
            "sparsify_: no layer of the model is eligible; change include, exclude, first_dense, heads_dense or "
            f"pattern in the SlopeConfig:\n{listed}"
        )
    _check_convertible("sparsify_", [layer for layer, _ in chosen], "convert before the first optimizer step")

    # Tensors that are made in inference mode cannot be trained, so the mode has to be that of the weights.
    with torch.inference_mode(any(layer.weight.is_inference() for layer, _ in chosen)):
        _convert(chosen)
    report = Report([*(decision for _, decision in decisions), *mixture_weights(model)])
    for layer, decision in decisions:
        if not decision.sparse:
            _note(layer, decision)
    _check_ranks(chosen)
    said: set[str] = set()
    for layer, _ in chosen:
        assert layer.sparse is not None
        layer.sparse.place = Place(layer.path, said)
        share(layer.module)
    for rule in config.unused([layer.path for layer, _ in decisions]):
        log.warning("sparsify_: %s matched no linear layer", rule)
    log.info("sparsify_: %d of %d linear layers are sparse now", len(report.sparse), len(report))
    check_loaded_state()
    if any(layer.weight.device.type == "cpu" for layer, _ in chosen):
        cpu_library.start_loading()  # compiled while the user builds the optimizer and reads data
    return report


def densify_(model: nn.Module) -> Report:
    """Inverse of :func:`sparsify_`: every prepared layer gets a dense weight again, in place.

    Adapters that are on are merged into the dense weight (which then is no longer N:M); adapters that are off are
    dropped.  The Parameter keeps its identity.

    Raises:
        ConversionError: no layer is prepared, or gradients or optimizer state belong to the compressed parameters.
            Nothing has been changed then.
    """
    _check_module("densify_", model)
    layers = [layer for layer in linear_layers(model) if layer.sparse or layer.low_rank]
    if not layers:
        raise ConversionError("densify_: the model has no prepared layer; sparsify_ it first")
    _check_convertible("densify_", layers, "densify_ a copy (copy.deepcopy(model))")
    for layer in layers:
        _remove(layer)
    for layer in linear_layers(model):
        layer.module.__dict__.pop("extra_repr", None)
        if isinstance(layer.module, _ShowsNote):
            layer.module.__class__ = type(layer.module).__mro__[2]
    return Report([decision for _, decision in decide(model, SlopeConfig(include=()))])


def add_adapters_(model: nn.Module, config: SlopeConfig) -> list[str]:
    """Give the layers that a configuration selects a disabled adapter each, on weights that stay dense (way A).

    Returns:
        The module paths.

    Raises:
        ConversionError: ``adapter_rank`` is 0 everywhere, or nothing is eligible.
    """
    chosen = [(layer, config.layer(layer.path)) for layer, decision in decide(model, config) if decision.sparse]
    _check_ranks(chosen)
    paths = []
    for layer, settings in chosen:
        if settings.adapter_rank:
            _register_adapter(layer, settings)
            share(layer.module)
            paths.append(layer.path)
    if not paths:
        raise ConversionError(
            "adapters: no eligible layer has an adapter_rank above 0; set SlopeConfig(adapter_rank=...)"
        )
    return paths


def _convert(chosen: Sequence[tuple[LinearLayer, LayerConfig]]) -> None:
    """Convert all of these layers or, should one fail, none.

    The patterns are computed first, and the original weights are held until the last layer is converted, so that a
    failure on the way leaves the model as it was.
    """
    patterns = [choose_pattern(layer.weight, settings, layer.transposed, layer.path) for layer, settings in chosen]
    originals = [(layer, layer.weight.data) for layer, _ in chosen]
    try:
        for (layer, settings), pattern in zip(chosen, patterns, strict=True):
            _register(layer, settings, pattern)
    except BaseException:  # an interrupt, too, leaves a whole model
        for layer, data in originals:
            _restore(layer, data)
        raise


def _register(layer: LinearLayer, settings: LayerConfig, pattern: Tensor) -> None:
    requires_grad = layer.weight.requires_grad
    sparse = SparseWeight(pattern, layer.shape, settings, layer.transposed)
    unshare(layer.module)
    parametrize.register_parametrization(layer.module, layer.name, sparse)
    adapt(layer.module)
    layer.weight.requires_grad_(requires_grad)
    sparse.pick_columns(layer.weight)
    if settings.adapter_rank:
        _register_adapter(layer, settings)


def _register_adapter(layer: LinearLayer, settings: LayerConfig) -> None:
    A, B = draw_adapter(layer.shape, settings, layer.path, layer.weight.detach())
    adapter = LowRank(A, B, settings.adapter_scale, layer.transposed)
    unshare(layer.module)
    parametrize.register_parametrization(layer.module, layer.name, adapter)


def _check_ranks(chosen: Sequence[tuple[LinearLayer, LayerConfig]]) -> None:
    """Warn once about adapters whose rank exceeds their layer's full rank."""
    over = [(layer, settings.adapter_rank) for layer, settings in chosen if settings.adapter_rank > min(layer.shape)]
    if not over:
        return
    smallest = min((layer for layer, _ in over), key=lambda layer: min(layer.shape))
    ranks = " or ".join(str(rank) for rank in sorted({rank for _, rank in over}))
    log.warning(
        "adapter_rank %s is more than the full rank of %d of %d layers (smallest: %r, %d x %d); an adapter of rank %d "
        "can already be any matrix of that shape",
        ranks, len(over), len(chosen), smallest.path, *smallest.shape, min(smallest.shape),
    )  # fmt: skip


def _restore(layer: LinearLayer, data: Tensor) -> None:
    """Take our parametrizations off again and put the original numbers back."""
    if parametrize.is_parametrized(layer.module, layer.name):
        _remove(layer)
    layer.weight.data = data


def _remove(layer: LinearLayer) -> None:
    """Take the parametrizations off the weight and register it in its old place, in front of biases.

    ``remove_parametrizations`` registers it last; an optimizer's checkpoint counts parameters in their order.
    """
    unshare(layer.module)  # the removal deletes `weight` from the class
    parametrize.remove_parametrizations(layer.module, layer.name, leave_parametrized=True)
    put_first(layer.module, ("weight", *ATTENTION_WEIGHTS))
    layer.weight.data = layer.weight.data.contiguous()  # of a Conv1D it is a transposed view by now


def _note(layer: LinearLayer, decision: Decision) -> None:
    module, note = layer.module, f"dense: {decision.why}"
    if parametrize.is_parametrized(module):  # by another library
        _print_children(module)
    if type(module).__repr__ is not nn.Module.__repr__:
        module.__dict__["extra_repr"] = DenseNote(note)
        module.__class__ = _showing_note(type(module))  # type: ignore[arg-type]  # "not Hashable"
        return
    # An instance attribute in front of the method; nn.Module.__repr__ looks it up on the instance.
    module.__dict__["extra_repr"] = DenseNote(", ".join(filter(None, (module.extra_repr(), note))))


def _print_children(module: nn.Module) -> None:
    """Have a parametrized module print its children, which some classes hide (Conv1D does)."""
    type(module).__repr__ = nn.Module.__repr__  # type: ignore[method-assign]  # its class is its own


def _check_module(who: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected a torch.nn.Module, got {type(model).__name__}")


def _check_not_prepared(model: nn.Module) -> None:
    prepared = [layer.path for layer in linear_layers(model) if layer.sparse or layer.low_rank]
    if prepared:
        raise ConversionError(
            f"sparsify_: the model is prepared already ({len(prepared)} layers, the first is {prepared[0]!r}); "
            "densify_ it first to convert it with another configuration"
        )


def _check_convertible(who: str, layers: Iterable[LinearLayer], way_out: str) -> None:
    layers = list(layers)
    for layer in layers:
        weight = layer.weight
        if weight.is_meta:
            raise ConversionError(
                f"{who}: the weight of {layer.path!r} is on the meta device and has no values to choose from; "
                "materialise the model first (model.to_empty(device=...), then initialise or load it)"
            )
        if weight.grad is not None:
            raise ConversionError(
                f"{who}: the weight of {layer.path!r} has a gradient of the old shape; call "
                "optimizer.zero_grad(set_to_none=True) first, or convert before the first backward"
            )
    if data_parallel([layer.weight for layer in layers]):
        raise ConversionError(
            f"{who}: the model is wrapped in DistributedDataParallel, which reduces gradients of the old shapes; "
            f"{who} the model first, then wrap it"
        )
    optimizers = optimizers_with_state([layer.weight for layer in layers])
    for layer in layers:
        if any(layer.weight in optimizer.state for optimizer in optimizers):
            raise ConversionError(
                f"{who}: an optimizer already has state for the weight of {layer.path!r}, whose shape would no "
                f"longer fit; {way_out}, or make a new optimizer afterwards and delete the old one"
            )
