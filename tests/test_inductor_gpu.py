"""Products in Inductor's code for a GPU: lowered for an sm_90 device that is not there; nothing runs.

What the generated kernels compute is for ``tests/gpu`` to show; here it is which kernels there are, and that those
that Inductor generates around ours compile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from offline_inductor import Program, generated, offline_gpu
from recording import compiled
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.kernels import cpu_build, gpu_tuning

pytest.importorskip("triton")

NAME = "NVIDIA H200"
WIDTH, TOKENS = 64, 32


@pytest.fixture(autouse=True)
def no_tables(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No measured tables of this machine."""
    folder = tmp_path_factory.mktemp("tables")
    monkeypatch.setattr(cpu_build, "cache_folder", lambda: folder)
    gpu_tuning.load.cache_clear()


class Block(nn.Module):
    """Attention of one head and MLP, pre-norm, ``[B, T, D] -> [B, T, D]``.

    Written in operations whose gradients PyTorch can trace for a device that it was not built for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        weights = torch.softmax(self.q(h) @ self.k(h).transpose(-1, -2) / WIDTH**0.5, -1)
        x = x + self.out(weights @ self.v(h))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return y


class Transformer(nn.Module):
    """Two blocks on embedded tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(self.norm(x)).float().square().mean()
        return loss


def programs(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], **patches: Any) -> list[Program]:
    """What the backend's graphs become on a GPU, while ``run`` compiles and calls them on the CPU."""
    found: list[Program] = []

    def watched(module: Any, inputs: Any, compiler: str, given: dict[str, Any]) -> Any:
        with offline_gpu():
            found.extend(generated(module, inputs, **{**given, **patches}))
        return module.forward

    monkeypatch.setattr("slope_compile.backend.compile_graph", watched)
    run()
    return found


def transformer(**fields: Any) -> nn.Module:
    model = Transformer().bfloat16()
    slope.sparsify_(model, slope.SlopeConfig(column_refresh="never", **fields))
    return model


def embedded() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, dtype=torch.bfloat16)


def test_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of a rewritten layer is a sparse kernel; the first linears and the head alone stay dense."""
    model, x = transformer(), embedded().requires_grad_()
    dense = 3 + 1
    sparse = 2 * 6 - 3
    forward, backward = programs(monkeypatch, lambda: compiled(model)(x))
    assert forward.products == Counter({"forward": sparse})
    assert backward.products == Counter({"grad_input": sparse, "grad_weight": sparse})
    assert (forward.dense, backward.dense) == (dense, 2 * dense)
    assert not forward.calls + backward.calls
    torch._dynamo.reset()

    def infer() -> None:
        with torch.no_grad():
            compiled(model)(x)

    (inference,) = programs(monkeypatch, infer)
    assert inference.products == Counter({"forward": sparse})
    assert inference.dense == dense
    assert not inference.calls
    # What follows a product runs in its kernel: the GELU of the MLPs.
    assert sum("tanh" in text and "def forward_sums" in text for text in inference.kernels.values()) == 1
    assert inference.products.total() == sparse
    for program in (forward, backward, inference):
        assert "torch.ops.slope." not in re.sub(r"(?m)^\s*#.*$", "", program.source)
