"""The oracle of the end-to-end tests: dense layers times a mask, forward and backward written out by hand.

    forward      Y  = X (W * mask)^T + b
    grad_input   dX = dY (W * mask * column_mask)        exact: without the column mask
    grad_weight  dW = (dY^T X) * mask

Nothing of the library is used: masks are read from the zeros of a pruned weight or from the documented bits of the
packed metadata, and the second mask is counted out in ``problems.column_mask``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from problems import column_mask
from slope_compile.pattern import Pattern
from tolerances import assert_same

NM = Pattern(2, 4)
_PATTERN = re.compile(r"^(?P<module>.*)\.parametrizations\.(?P<name>\w+)\.0\.pattern$")
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

ColumnMask = Callable[[Tensor], Tensor]
"""Masked weight ``[N, K]`` -> which of its entries the input gradient uses."""


def every_entry(weight: Tensor) -> Tensor:
    """The exact backward."""
    return torch.ones_like(weight, dtype=torch.bool)


def picked_now(weight: Tensor) -> Tensor:
    """Double pruning, picked by magnitude at each backward."""
    return column_mask(weight, NM)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, columns: ColumnMask) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.columns, ctx.has_bias = columns, bias is not None
        y = x @ (weight * mask).t()
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight, mask = ctx.saved_tensors
        masked = weight * mask
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])) * mask
        return grad @ (masked * ctx.columns(masked)), grad_weight, rows.sum(0) if ctx.has_bias else None, None, None


def masked_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, columns: ColumnMask | None
) -> Tensor:
    """``X (W * mask)^T + b``; ``columns`` None leaves the backward to autograd, which autocast needs."""
    if columns is None:
        return F.linear(x, weight * mask, bias)
    y: Tensor = _Product.apply(x, weight, bias, mask, columns)  # type: ignore[no-untyped-call]
    return y


class MaskedLinear(nn.Module):
    """A linear layer whose weight, ``[N, K]`` or ``[K, N]`` if ``transposed``, counts only where ``mask [N, K]``."""

    mask: Tensor

    def __init__(self, layer: nn.Module, mask: Tensor, columns: ColumnMask | None) -> None:
        super().__init__()
        assert isinstance(layer.weight, nn.Parameter)
        bias: Any = layer.bias
        self.weight = layer.weight
        self.bias: nn.Parameter | None = bias
        self.transposed = tuple(layer.weight.shape) != tuple(mask.shape) or not isinstance(layer, nn.Linear)
        self.register_buffer("mask", mask)
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        return masked_product(x, weight, self.bias, self.mask, self.columns)


class MaskedAttention(nn.Module):
    """``nn.MultiheadAttention`` without masks and dropout, its projections written out, its weights masked."""

    def __init__(self, layer: nn.MultiheadAttention, columns: ColumnMask | None) -> None:
        super().__init__()
        self.heads, self.batch_first = layer.num_heads, layer.batch_first
        self.in_proj_bias, self.out_proj = layer.in_proj_bias, layer.out_proj
        for name in _PROJECTIONS:
            self.register_parameter(name, getattr(layer, name))
        self.masks: dict[str, Tensor] = {}
        self.columns = columns

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **unused: Any) -> tuple[Tensor, None]:
        inputs = (query, key, value) if self.batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))
        biases = self.in_proj_bias.chunk(3)
        if self.in_proj_weight is not None:
            # One product for q, k and v: it is the whole weight whose columns are picked.
            assert query is key is value
            projected = self._product("in_proj_weight", inputs[0], self.in_proj_bias).chunk(3, dim=-1)
        else:
            projected = tuple(
                self._product(f"{letter}_proj_weight", x, bias)
                for letter, x, bias in zip("qkv", inputs, biases, strict=True)
            )
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)
        y = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None

    def _product(self, name: str, x: Tensor, bias: Tensor) -> Tensor:
        weight = self.get_parameter(name)
        if name not in self.masks:
            return F.linear(x, weight, bias)
        return masked_product(x, weight, bias, self.masks[name], self.columns)


def masked_copy(
    dense: nn.Module, masks: dict[str, Tensor], columns: ColumnMask | None = every_entry
) -> nn.Module:
    """A copy of a dense model in which the layers that have a mask count only where it is set."""
    copied = copy.deepcopy(dense)
    for path, module in list(copied.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            _put(copied, path, MaskedAttention(module, columns))
    for path, mask in masks.items():
        parent, _, name = path.rpartition(".")
        if name in _PROJECTIONS:
            attention = copied.get_submodule(parent)
            assert isinstance(attention, MaskedAttention)
            attention.masks[name] = mask
        else:
            _put(copied, path, MaskedLinear(copied.get_submodule(path), mask, columns))
    return copied


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def masks_of_prepared(model: nn.Module) -> dict[str, Tensor]:
    """Module path -> keep mask ``[N, K]`` of every layer of a prepared model, from its ``state_dict``."""
    masks = {}
    for name, tensor in model.state_dict().items():
        match = _PATTERN.match(name)
        if match:
            K = model.get_parameter(f"{name.removesuffix('0.pattern')}original").shape[1] // NM.keep * NM.group
            path = match["module"] if match["name"] == "weight" else f"{match['module']}.{match['name']}"
            masks[path] = unpacked(tensor, K)
    return masks


def unpacked(pattern: Tensor, K: int) -> Tensor:
    """Keep mask ``[N, K]`` from the documented bits."""
    return torch.stack([(pattern[:, k // 8] >> (k % 8)) & 1 for k in range(K)], dim=1).bool()


def masks_of_pruned(model: nn.Module) -> dict[str, Tensor]:
    """The same for a dense model that was pruned in place: its random weights are zero nowhere else.

    The row of a padding token is zero too, hence a quarter of the entries at least: every pattern prunes more.
    """
    masks = {}
    for path, layer in model.named_modules():
        for name in ("weight", *_PROJECTIONS):
            weight = getattr(layer, name, None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and float((weight == 0).double().mean()) > 0.25:
                mask = weight.detach() != 0
                kept = mask if isinstance(layer, nn.Linear | nn.MultiheadAttention) else mask.t()
                masks[path if name == "weight" else f"{path}.{name}"] = kept
    return masks


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Of a model in either form."""
    return masks_of_prepared(model) or masks_of_pruned(model)


def is_exactly(nm: Pattern, mask: Tensor) -> bool:
    """Whether every group of a keep mask ``[N, K]`` has exactly ``keep`` entries."""
    return bool((mask.reshape(mask.shape[0], -1, nm.group).sum(-1) == nm.keep).all())


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    """Every gradient of a dense or prepared model equals that of its :func:`masked_copy`, in the parameter's form.

    A parameter that is not used has no gradient in either.
    """
    names = dict(model.named_parameters())
    compared = set()
    for name, parameter in reference.named_parameters():
        module, _, own = name.rpartition(".")
        expected, mask = parameter.grad, mask_of(reference.get_submodule(module), own)
        stored = f"{module}.parametrizations.{own}.original"
        if stored in names:
            name = stored
            assert expected is not None
            assert mask is not None
            dense = expected if expected.shape == mask.shape and not _transposed(reference, module) else expected.t()
            expected = dense[mask].view(mask.shape[0], -1)
        actual = names[name].grad
        assert (actual is None) == (expected is None), f"{name}: {'no ' if actual is None else 'a '}gradient"
        if actual is not None and expected is not None:
            assert_same(actual, expected, name)
        compared.add(name)
    assert compared == set(names), "parameters that were not compared"


def mask_of(layer: nn.Module, name: str) -> Tensor | None:
    """The mask of a parameter of a masked layer."""
    if isinstance(layer, MaskedAttention):
        return layer.masks.get(name)
    return layer.mask if isinstance(layer, MaskedLinear) and name == "weight" else None


def _transposed(reference: nn.Module, path: str) -> bool:
    layer = reference.get_submodule(path)
    return isinstance(layer, MaskedLinear) and layer.transposed
