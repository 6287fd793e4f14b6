"""The example that exports, saves, loads and trains: what it prints against numbers counted here, and its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

import export_program
import slope_compile as slope
from gpt import GPT, GPTConfig
from masked import masked_copy

WIDTH, RANK, STEPS = 16, 8, 5
NAMES = {"attention.qkv": (3, 1), "attention.out": (1, 1), "mlp.up": (4, 1), "mlp.down": (1, 4)}
"""(N, K) in widths."""
SPARSE = {
    f"blocks.{block}.{name}": (N * WIDTH, K * WIDTH)
    for block in (0, 1)
    for name, (N, K) in NAMES.items()
    if (block, name) != (0, "attention.qkv")
}


def test_export_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "programs"
    export_program.main(["--width", str(WIDTH), "--steps", str(STEPS), "--out", str(out)])
    printed = capsys.readouterr().out
    for path, (N, K) in SPARSE.items():
        assert re.search(rf"^{re.escape(path)} +{N}x{K} +2:4 +double_pruned +selected$", printed, re.MULTILINE)
    assert re.search(r"^blocks\.0\.attention\.qkv +48x16 +dense +first linear after the input$", printed, re.MULTILINE)
    assert re.search(r"^head +256x16 +dense +output head$", printed, re.MULTILINE)
    assert "7 of 9 linears sparse" in printed

    torch.manual_seed(0)
    dense = GPT(GPTConfig(layers=2, width=WIDTH, heads=4, context=64))
    tokens = torch.randint(0, 256, (4, 64))
    # fp32 state: half of the weights, a bit for each, and adapters with a scale of 8 bytes.
    before = sum(p.numel() * 4 for p in dense.parameters())
    after = before + sum(-N * K * 2 + N * K // 8 + RANK * (N + K) * 4 + 8 for N, K in SPARSE.values())
    sizes = [(out / name).stat().st_size for name in ("dense.pt2", "sparse.pt2")]
    assert re.search(rf"^dense +{before} +{sizes[0]}$", printed, re.MULTILINE)
    assert re.search(rf"^2:4 +{after} +{sizes[1]}$", printed, re.MULTILINE)

    prepared = GPT(GPTConfig(layers=2, width=WIDTH, heads=4, context=64))
    prepared.load_state_dict(dense.state_dict())
    slope.sparsify_(prepared)
    weights = {path: prepared.get_submodule(path).weight for path in SPARSE}
    masks = {path: weight.detach() != 0 for path, weight in weights.items() if isinstance(weight, torch.Tensor)}
    inputs = (tokens, tokens.roll(-1, dims=1))
    loss = masked_copy(dense, masks)(*inputs).item()
    trained = re.search(r"trained the loaded program: loss ([\d.]+) -> ([\d.]+) in 5 steps", printed)
    assert trained is not None
    assert float(trained[1]) == pytest.approx(loss, abs=6e-4)
    assert float(trained[2]) < float(trained[1])
    # Of each adapter: its two factors, two products, their scale and the sum.
    nodes = re.search(r"adapters came on after step 4: (\d+) -> (\d+) graph nodes", printed)
    assert nodes is not None
    assert int(nodes[2]) - int(nodes[1]) == 6 * len(SPARSE)

    loaded = torch.export.load(out / "sparse.pt2").module()
    assert isinstance(loaded, GraphModule)
    assert loaded(*inputs).item() == pytest.approx(loss, rel=1e-5)
    original = torch.export.load(out / "dense.pt2").module()
    assert original(*inputs).item() == pytest.approx(dense(*inputs).item(), rel=1e-5)
    other = torch.randint(0, 256, (7, 64))  # the batch was exported as a symbol
    assert loaded(other, other).item() == pytest.approx(masked_copy(dense, masks)(other, other).item(), rel=1e-5)
