"""What Inductor generates for a GPU, run on one: each way forced in turn, and under CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from recording import compiled
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.kernels import gpu_calls, gpu_rules
from tolerances import UNIT_ROUNDOFF

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    """Two products with something to fuse between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


def prepared(**fields: Any) -> nn.Module:
    net = Net().cuda().bfloat16()
    slope.sparsify_(net, slope.SlopeConfig(first_dense=False, heads_dense=False, **fields))
    return net


def step(run: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    found = {"y": y, "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().float().clone() for name, value in found.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = float((value - expected[name]).abs().max() / expected[name].abs().max())
        assert error <= 8 * UNIT_ROUNDOFF[torch.bfloat16], f"{name}: {error}"


@pytest.mark.parametrize("backward", ["double_pruned", "exact"])
@pytest.mark.parametrize("way", gpu_rules.WAYS)
def test_each_way(way: str, backward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of the compiled model is that of the same rewritten graph without Inductor, in float32."""
    model, x = prepared(backward=backward, column_refresh="never"), torch.randn(96, 128, device="cuda")
    twin = copy.deepcopy(model).float()
    expected = step(compiled(twin), twin, x.bfloat16().float())
    torch._dynamo.reset()

    def forced(op: str, *case: Any) -> str:
        return way if gpu_calls.can(way, op, *case) else "expanded"

    if not gpu_calls.can(way, "forward", 96, 256, 128, torch.bfloat16, torch.device("cuda", 0)):
        pytest.skip(f"{way} does not exist on this GPU")
    monkeypatch.setattr(gpu_calls, "chosen", forced)
    assert_near(step(compiled(model, "inductor"), model, x.bfloat16()), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_under_max_autotune(dynamic: bool) -> None:
    model, x = prepared(column_refresh="never"), torch.randn(96, 128, device="cuda")
    twin = copy.deepcopy(model).float()
    expected = step(compiled(twin), twin, x.bfloat16().float())
    torch._dynamo.reset()
    run = compiled(model, "inductor", dynamic=dynamic, options={"max_autotune": True})
    assert_near(step(run, model, x.bfloat16()), expected)


def test_cuda_graphs_follow_optimizer_and_column_mask() -> None:
    """reduce-overhead: replayed steps use the updated weights and the column mask that was refreshed in place."""
    graphed = prepared(column_refresh=2)
    plain = copy.deepcopy(graphed)
    run = torch.compile(graphed, backend="slope", mode="reduce-overhead")
    reference = compiled(plain)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (graphed, plain)]
    for _ in range(6):
        x = torch.randn(96, 128, device="cuda").bfloat16()
        found, expected = step(run, graphed, x), step(reference, plain, x)
        assert_near(found, expected)
        for optimizer in optimizers:
            optimizer.step()
    state = dict(graphed.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(state[name], buffer), name
