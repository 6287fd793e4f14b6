"""The example that shows the rewrite: its table against numbers counted here, its drawing as a file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import torch

import inspect_graph
import slope_compile as slope
from gpt import GPT, GPTConfig
from masked import masked_copy
from problems import column_mask

LINEARS = (*(f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")), "head")
SPARSE = LINEARS[1:4]
SHAPES = dict(zip(LINEARS, ("48x16", "16x16", "64x16", "16x64", "256x16"), strict=True))
SMALL = ["--width", "16", "--heads", "2", "--layers", "1"]


def model_and_data() -> tuple[GPT, torch.Tensor, torch.Tensor]:
    """What the example makes of its seed."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=1, width=16, heads=2, context=32))
    return model, torch.randint(0, 256, (2, 32)), torch.randint(0, 256, (2, 32))


def keep_masks(model: GPT, pattern: str) -> dict[str, torch.Tensor]:
    """The masks that ``sparsify_`` gives the same layers: nonzero entries of its weights."""
    slope.sparsify_(model, slope.SlopeConfig(pattern=pattern))
    weights = {path: model.get_submodule(path).weight for path in SPARSE}
    return {path: weight.detach() != 0 for path, weight in weights.items() if isinstance(weight, torch.Tensor)}


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_the_table(pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "graph.png"
    inspect_graph.main([*SMALL, "--pattern", pattern, "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    header, *table = [re.split(r"\s{2,}", line.strip()) for line in lines[: lines.index("")] if "---" not in line]
    assert header == ["node", "weight", "N x K", "pattern", "density", "density W^{R,C}", "decision", "reason"]
    rows = {row[1]: dict(zip(header, row, strict=True)) for row in table}
    assert tuple(rows) == LINEARS
    assert {path: row["N x K"] for path, row in rows.items()} == SHAPES

    nm = slope.Pattern.parse(pattern)
    masks = keep_masks(model_and_data()[0], pattern)
    dense, tokens, targets = model_and_data()
    for path, row in rows.items():
        if path not in SPARSE:
            assert [row[name] for name in header[3:7]] == ["-", "1.0000", "1.0000", "dense"]
            assert row["reason"] == {"head": "output head"}.get(path, "first linear after the input")
            continue
        weight = dense.get_parameter(f"{path}.weight").detach() * masks[path]
        twice = weight * column_mask(weight, nm)
        counted = [f"{int(w.count_nonzero()) / w.numel():.4f}" for w in (weight, twice)]
        assert counted[0] == f"{nm.density:.4f}"
        assert [row[name] for name in header[3:8]] == [pattern, *counted, "sparse", "selected"]
    assert len({row["node"] for row in rows.values()}) == len(LINEARS)

    losses = [module(tokens, targets).item() for module in (dense, masked_copy(dense, masks))]
    assert f"loss before {losses[0]:.4f}, after {losses[1]:.4f}" in "\n".join(lines)
    assert f"drawing: {out}" in lines


@pytest.mark.parametrize("adapters", [False, True])
def test_the_drawing(adapters: bool, tmp_path: Path) -> None:
    """Every linear is named in both graphs, the adapters only where they are on; the text is text."""
    out = tmp_path / "graph.svg"
    inspect_graph.main([*SMALL, "--out", str(out), *(["--adapters"] if adapters else [])])
    root = ET.parse(out).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = Counter("".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text"))
    assert {path: texts[path] for path in LINEARS} == dict.fromkeys(LINEARS, 2)
    for path in SPARSE:
        assert texts[f"{path} A"] == texts[f"{path} B"] == int(adapters)
    assert texts["before"] == texts["after: 2:4"] == 1
    assert set(inspect_graph.COLOURS) <= set(texts), "the legend"
    colours = inspect_graph.COLOURS
    marks = {kind: len(re.findall(rf"<use [^>]*fill: {colours[kind]};", out.read_text())) for kind in colours}
    assert (marks["sparse"], marks["low-rank"], marks["dense"]) == (3, 6 * adapters, 5 + 2)
