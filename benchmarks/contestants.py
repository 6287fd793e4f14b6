"""The models of the suites layer and model: one dense, one sparse whose adapters are on or off, compiled alike.

Each block is compiled by itself, so that the time of compilation does not grow with depth.  The sparse model is
prepared with adapters; off, they are no part of the graph, so one model serves as both contenders.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import slope_compile as slope
from benchmarks import choices
from benchmarks.cases import Options

DENSE, SPARSE, ADAPTERS = "dense", "slope", "slope_adapters"
CONFIG = slope.SlopeConfig(first_dense=False, heads_dense=False, mask="magnitude")
"""All linears are sparse, because blocks have neither a model's first linear nor its head.  Masks are picked by
magnitude, which is fast on the device and random for random weights.  Random masks would be drawn on the CPU, which
takes minutes for large models."""


@dataclasses.dataclass(frozen=True)
class Contestants:
    """Dense and sparse, with the same initial numbers where both have them."""

    dense: nn.Module
    sparse: nn.Module
    paths: list[str]
    """Of the sparse linears."""
    R: int

    def of(self, contender: str) -> nn.Module:
        """The module of a contender, its adapters on or off as the name says."""
        if contender == DENSE:
            return self.dense
        slope.set_adapters(self.sparse, contender == ADAPTERS)
        return self.sparse

    def names(self) -> tuple[str, str, str]:
        return DENSE, SPARSE, ADAPTERS


def draw(
    make: Callable[[], nn.Module], width: int, share: float, dtype: torch.dtype, options: Options, backward: str
) -> Contestants:
    """Build and prepare the models.

    Args:
        make: the dense model, on the default device.
        width: the rank of the adapters is ``share`` of it.
        backward: "double_pruned" or "exact".
    """
    torch.manual_seed(0)
    with torch.device(options.device):
        dense = make().to(dtype)
    sparse = copy.deepcopy(dense)
    R = choices.rank(width, width, share)
    config = dataclasses.replace(CONFIG, adapter_rank=R, backward="exact" if backward == "exact" else "double_pruned")
    report = slope.sparsify_(sparse, config)
    return Contestants(dense, sparse, [decision.weight for decision in report.sparse], R)


def compile_(modules: Iterable[nn.Module], sparse: bool, options: Options) -> None:
    """Compile each module by itself, in place, with the same options on both sides.

    The modules are alike, so one graph serves them all.
    """
    given: dict[str, Any] = {"options": {"max_autotune": True}} if options.autotune else {}
    for module in modules:
        module.compile(backend=slope.slope if sparse else "inductor", **given)


def step(model: Callable[..., Tensor], x: Tensor, grad: Tensor, *args: Any) -> None:
    """Forward and backward, from the gradient of the output to that of the input and the weights."""
    x.grad = None
    model(x, *args).backward(grad)


def state_of(found: Contestants, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """Bytes of training state of dense and sparse at this moment, by group and kind."""
    parts = {
        DENSE: slope.training_state(found.dense, optimizers[DENSE], found.paths),
        SPARSE: slope.training_state(found.sparse, optimizers[SPARSE]),
    }
    return {name: dataclasses.asdict(state) for name, state in parts.items()}
