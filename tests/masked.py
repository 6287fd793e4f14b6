"""The oracle of the end-to-end tests: dense layers times a mask, forward and backward written out by hand.

    forward      Y  = X (W * mask)^T + b
    grad_input   dX = dY (W * mask * column_mask)        exact: without the column mask
    grad_weight  dW = (dY^T X) * mask

Nothing of the library is used: masks are read from the zeros of a pruned weight or from the documented bits of the
packed metadata, and the second mask is counted out in ``problems.column_mask``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from problems import column_mask
from slope_compile.pattern import Pattern
from tolerances import assert_same

NM = Pattern(2, 4)
_ORIGINAL = ".parametrizations.weight.original"
_PATTERN = ".parametrizations.weight.0.pattern"

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


class MaskedLinear(nn.Module):
    """A linear layer whose weight, ``[N, K]`` or ``[K, N]`` if ``transposed``, counts only where ``mask [N, K]``."""

    mask: Tensor

    def __init__(self, layer: nn.Module, mask: Tensor, columns: ColumnMask) -> None:
        super().__init__()
        assert isinstance(layer.weight, nn.Parameter)
        self.weight = layer.weight
        self.bias = layer.bias
        self.transposed = tuple(layer.weight.shape) != tuple(mask.shape) or not isinstance(layer, nn.Linear)
        self.register_buffer("mask", mask)
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        y: Tensor = _Product.apply(x, weight, self.bias, self.mask, self.columns)  # type: ignore[no-untyped-call]
        return y


def masked_copy(dense: nn.Module, masks: dict[str, Tensor], columns: ColumnMask = every_entry) -> nn.Module:
    """A copy of a dense model in which the layers that have a mask count only where it is set."""
    copied = copy.deepcopy(dense)
    for path, mask in masks.items():
        parent, _, name = path.rpartition(".")
        layer = copied.get_submodule(path)
        setattr(copied.get_submodule(parent), name, MaskedLinear(layer, mask, columns))
    return copied


def masks_of_prepared(model: nn.Module) -> dict[str, Tensor]:
    """Module path -> keep mask ``[N, K]`` of every layer of a prepared model, from its ``state_dict``."""
    masks = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(_PATTERN):
            path = name.removesuffix(_PATTERN)
            K = model.get_parameter(path + _ORIGINAL).shape[1] // NM.keep * NM.group
            masks[path] = torch.stack([(tensor[:, k // 8] >> (k % 8)) & 1 for k in range(K)], dim=1).bool()
    return masks


def masks_of_pruned(model: nn.Module) -> dict[str, Tensor]:
    """The same for a dense model that was pruned in place: its random weights are zero nowhere else.

    The row of a padding token is zero too, hence a quarter of the entries at least: every pattern prunes more.
    """
    masks = {}
    for path, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and float((weight == 0).double().mean()) > 0.25:
            mask = weight.detach() != 0
            masks[path] = mask if isinstance(layer, nn.Linear) else mask.t()
    return masks


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Of a model in either form."""
    return masks_of_prepared(model) or masks_of_pruned(model)


def is_exactly(nm: Pattern, mask: Tensor) -> bool:
    """Whether every group of a keep mask ``[N, K]`` has exactly ``keep`` entries."""
    return bool((mask.reshape(mask.shape[0], -1, nm.group).sum(-1) == nm.keep).all())


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    """Every gradient of a dense or prepared model is that of its :func:`masked_copy`, compressed where it is."""
    names = dict(model.named_parameters())
    compared = set()
    for name, parameter in reference.named_parameters():
        path = name.removesuffix(".weight")
        layer = reference.get_submodule(path) if name.endswith(".weight") else None
        expected = parameter.grad
        if isinstance(layer, MaskedLinear) and path + _ORIGINAL in names:
            name = path + _ORIGINAL
            assert expected is not None
            dense = expected.t() if layer.transposed else expected
            expected = dense[layer.mask].view(dense.shape[0], -1)
        actual = names[name].grad
        assert expected is not None, f"{name}: the reference has no gradient"
        assert actual is not None, f"{name} has no gradient"
        assert_same(actual, expected, name)
        compared.add(name)
    assert compared == set(names), "parameters that were not compared"
