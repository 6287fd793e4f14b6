"""Compiled models against float64: the loss, and all gradients, of a training step on the device.

The truth is the same prepared model in float64 on the CPU, its rewritten graph run by the operators' definitions.  The
yardstick is a dense model with the expanded weights, compiled by Inductor on the device in the same dtype, against its
own float64.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import slope_compile as slope
from benchmarks import blocks
from benchmarks.blocks import Blocks
from benchmarks.cases import DTYPES, Case, Measurement, Options, Run
from benchmarks.choices import rank, verify
from benchmarks.contestants import CONFIG, step
from tolerances import in_sequence

FACTOR = 1.25
"""Largest error of all gradients together, as a multiple of the dense model's.  It is larger than for a single product,
because a step is a chain of some dozen products, whose errors vary more with the order of summation.  In float32, where
that order is the only difference, sums in sequence pass too."""

SIZES = {
    "gpt": blocks.Size(width=256, mlp=1024, heads=4, layers=2, vocabulary=64),
    "llama": blocks.Size(
        width=256, mlp=704, heads=4, kv_heads=2, layers=2, vocabulary=64, family="llama", activation="silu"
    ),
}
Forced = Callable[[str | None], contextlib.AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One compiled model."""

    model: str
    dtype: str
    way: str | None
    """See :func:`benchmarks.correctness.forced`."""
    backward: str
    adapters: bool = False
    autotune: bool = False
    tokens: int = 64
    """Of each of two sequences."""

    @property
    def name(self) -> str:
        way = self.way or "rule"
        extra = "/adapters" * self.adapters + "/autotuned" * self.autotune
        return f"{self.model}/{self.backward}/{way}{extra}/{self.dtype}"


SETTINGS = (
    Setting("llama", "bfloat16", None, "double_pruned"),
    Setting("gpt", "bfloat16", "wgmma_sp", "double_pruned", adapters=True),
    Setting("gpt", "bfloat16", "triton", "double_pruned"),
    Setting("llama", "bfloat16", "expanded", "double_pruned"),
    Setting("gpt", "bfloat16", "triton", "exact", adapters=True),
    Setting("llama", "bfloat16", "few", "double_pruned", tokens=4),
    Setting("llama", "bfloat16", "mma_sp", "double_pruned"),
    Setting("llama", "bfloat16", "cusparselt", "double_pruned"),
    Setting("gpt", "float16", "triton", "double_pruned"),
    Setting("gpt", "float32", "triton", "double_pruned"),
    Setting("llama", "bfloat16", None, "double_pruned", autotune=True),
    Setting("gpt", "bfloat16", "expanded", "exact"),
    Setting("llama", "float16", None, "exact", adapters=True),
    Setting("llama", "float32", None, "exact"),
)


def cases(options: Options, forced: Forced, threads: int) -> list[Case]:
    chosen = [setting for setting in SETTINGS if options.wants(setting.dtype)]
    return [
        Case(
            f"correctness/model/{setting.name}", functools.partial(_run, setting, options, forced), threads,
            limit=200.0, needs=20.0,
        )
        for setting in (chosen[:1] if options.tiny else chosen)
    ]  # fmt: skip


def _run(setting: Setting, options: Options, forced: Forced, given: Run) -> Iterator[Measurement]:
    size = SIZES[setting.model]
    dtype = DTYPES[setting.dtype]
    torch.manual_seed(0)
    model = Blocks(size, 1 if options.tiny else 2).to(dtype)
    R = rank(size.width, size.width, 0.0625) if setting.adapters else 0
    exact = setting.backward == "exact"
    config = dataclasses.replace(CONFIG, adapter_rank=R, backward="exact" if exact else "double_pruned")
    slope.sparsify_(model, config)
    if R:
        slope.set_adapters(model, True)
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):  # Zero at first, which would check half of the adapter only.
                nn.init.normal_(parameter, std=0.02)
    x, grad = (torch.randn(2, setting.tokens, size.width).to(dtype) for _ in range(2))
    truth = _step(model, x, grad, torch.float64, "cpu", backend=slope.slope, options={"compiler": "aot_eager"})
    tuned: dict[str, Any] = {"options": {"max_autotune": True}} if setting.autotune else {}
    if setting.way == "cusparselt":
        for N, K in {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear)}:
            verify(options.device, setting.dtype, x.shape[0] * x.shape[1], N, K)
    with forced(setting.way):
        result = _step(model, x, grad, dtype, options.device, backend=slope.slope, **tuned)
    dense = copy.deepcopy(model)
    slope.densify_(dense)
    dense_truth = _step(dense, x, grad, torch.float64, "cpu")
    dense_result = _step(dense, x, grad, dtype, options.device, backend="inductor")
    errors = {
        part: {"slope": _error(result[part], truth[part]), "dense": _error(dense_result[part], dense_truth[part])}
        for part in ("output", "gradients")
    }
    allowed = _sums_in_sequence(size, x.shape[0] * x.shape[1]) if dtype is torch.float32 else 0.0
    passed = all(error["slope"] <= max(FACTOR * error["dense"], allowed) for error in errors.values())
    facts = dataclasses.asdict(setting) | {"errors": errors, "passed": passed, "rank": R}
    yield Measurement("correctness_model", {}, {}, facts)


def _sums_in_sequence(size: blocks.Size, tokens: int) -> float:
    """What the order of sums may make of the gradients in float32: that of the longest sum in each product on the way,
    four a block forward and four back."""
    return in_sequence(max(size.mlp, tokens)) * math.sqrt(8 * size.layers)


def _step(
    model: nn.Module, x: Tensor, grad: Tensor, dtype: torch.dtype, device: Any, **compiled: Any
) -> dict[str, dict[str, Tensor]]:
    """Output and gradients, the input's first, in float64 on the CPU; compiled if options are given."""
    twin = copy.deepcopy(model).to(dtype).to(device)
    inputs = x.detach().clone().to(dtype).to(device).requires_grad_()
    run: Any = torch.compile(twin, **compiled) if compiled else twin
    outputs = []

    def forward(given: Tensor) -> Tensor:
        output: Tensor = run(given)
        outputs.append(output)
        return output

    step(forward, inputs, grad.to(dtype).to(device))
    gradients = {"input": inputs.grad} | {name: parameter.grad for name, parameter in twin.named_parameters()}
    return {
        "output": {"output": outputs[0].detach().double().cpu()},
        "gradients": {name: g.detach().double().cpu() for name, g in gradients.items() if g is not None},
    }


def _error(results: dict[str, Tensor], truths: dict[str, Tensor]) -> float:
    """Of all tensors: each one's error as a share of its norm, root of the mean of the squares.

    Raises:
        ArithmeticError: one has tensors that the other has not.
    """
    if different := results.keys() ^ truths.keys():
        raise ArithmeticError(f"gradients of some parameters only: {', '.join(sorted(different))}")
    shares = [float((results[n] - t).norm() / t.norm().clamp_min(1e-300)) for n, t in truths.items()]
    return float(torch.tensor(shares, dtype=torch.float64).square().mean().sqrt())
