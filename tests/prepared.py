"""Small models for the tests of ``sparsify_``, and their hand-masked dense twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from problems import kept
from slope_compile.layers import LinearLayer, linear_layers
from tolerances import assert_same

WIDTH, HIDDEN, CLASSES = 16, 32, 5


class Block(nn.Module):
    """Residual MLP, ``[..., 16] -> [..., 16]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


class Net(nn.Module):
    """A first linear, two blocks, a head: the method makes the four linears of the blocks sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def blocks(**settings: Any) -> nn.Module:
    """A first linear, two that the method makes sparse, a head."""
    return nn.Sequential(*(nn.Linear(8, 8, **settings) for _ in range(4)))


SPARSE = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def net(dtype: torch.dtype = torch.float64) -> Net:
    """A net with random weights in this dtype, in float64 by default: equality then is to rounding."""
    return Net().to(dtype)


def sparse_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """The prepared layers by path."""
    return {layer.path: layer for layer in linear_layers(model) if layer.sparse is not None}


def keep_mask(layer: LinearLayer) -> Tensor:
    """bool ``[N, K]``, read bit by bit from the buffer as documented."""
    assert layer.sparse is not None
    columns = torch.arange(layer.shape[1])
    return (layer.sparse.pattern[:, columns // 8] >> (columns % 8).to(torch.uint8) & 1).bool()


def masked_weights(dense: nn.Module, prepared: nn.Module) -> dict[str, Tensor]:
    """Replacements for ``torch.func.functional_call(dense, ...)``: each sparse layer's weight times its mask."""
    replaced = {}
    for path, layer in sparse_layers(prepared).items():
        mask = keep_mask(layer)
        replaced[f"{path}.weight"] = dense.get_parameter(f"{path}.weight") * (mask.t() if layer.transposed else mask)
    return replaced


def assert_equals_masked_dense(
    prepared: nn.Module, dense: nn.Module, *inputs: Any, output: Callable[[Any], Tensor] = lambda y: y
) -> None:
    """Forward and every gradient of a prepared model are those of its dense twin under hand-made masks.

    Args:
        prepared: the model after ``sparsify_``.
        dense: a copy from before it, unmasked.
        inputs: what both are called with.
        output: takes the tensor to differentiate out of what the model returns.
    """
    expected = output(torch.func.functional_call(dense, masked_weights(dense, prepared), inputs))
    got = output(prepared(*inputs))
    assert_same(got, expected, "output")
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    got.backward(cotangent)

    layers = sparse_layers(prepared)
    parameters = dict(prepared.named_parameters())
    for name, true in dense.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            compare(parameters[name].grad, true.grad, name)
            continue
        assert true.grad is not None
        gradient = true.grad.t() if layer.transposed else true.grad
        compare(layer.weight.grad, kept(gradient, keep_mask(layer)), name)


def compare(got: Tensor | None, expected: Tensor | None, name: str) -> None:
    """Both gradients are missing (a parameter that takes no part) or equal."""
    assert (got is None) == (expected is None), name
    if got is not None and expected is not None:
        assert_same(got, expected, f"gradient of {name}")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a refused conversion must leave as it was."""
    return {
        "state": {k: (v.dtype, v.shape, v.clone()) for k, v in model.state_dict().items()},
        "parameters": [(name, id(p), p.requires_grad, p.is_leaf) for name, p in model.named_parameters()],
        "gradients": {n: copy.copy(p.grad) for n, p in model.named_parameters() if p.grad is not None},
        "classes": [(path, type(module)) for path, module in model.named_modules()],
        "print": str(model),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Bitwise the same state, the same Parameter objects in the same order, the same classes and text."""
    after = snapshot(model)
    for part in ("parameters", "classes", "print"):
        assert after[part] == before[part], part
    assert list(after["state"]) == list(before["state"])
    for key, (dtype, shape, value) in before["state"].items():
        now = after["state"][key]
        assert now[:2] == (dtype, shape), key
        assert value.is_meta or torch.equal(now[2], value), key
    assert after["gradients"].keys() == before["gradients"].keys()
    assert all(torch.equal(g, before["gradients"][n]) for n, g in after["gradients"].items())
