"""The library's loggers, as PyTorch's own variable switches them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import torch
from toy import token_ids, toy
torch.compile(toy(torch.float32), backend="slope", options={"compiler": "eager"})(token_ids())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "table", "summary"),
    [("+slope_compile", True, True), ("slope_compile", False, True), ("", False, False)],
)
def test_torch_logs(variable: str, table: bool, summary: bool) -> None:
    """``+slope_compile``: each graph's decisions; without the plus sign, a line per graph; by default, neither."""
    given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    given.pop("TORCH_LOGS", None)
    if variable:
        given["TORCH_LOGS"] = variable
    done = subprocess.run([sys.executable, "-c", COMPILE], env=given, capture_output=True, text=True, check=True)
    assert ("first linear after the input" in done.stderr) == table
    assert ("7 of 9 linears of the graph are sparse" in done.stderr) == summary
    assert "pruned" in done.stderr, "that the weights were pruned in place is said in any case"
