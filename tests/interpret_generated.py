"""Kernels that Inductor generated, run by Triton's interpreter on CPU tensors and compared with float64.

``TRITON_INTERPRET=1 python tests/interpret_generated.py kernels.json``: run by ``test_inductor_gpu``, which writes the
file.  Each is a product of a bfloat16 layer whose output goes through ``relu(y) + residual``, or whose input
comes ``turned``, as ``[K, M]``.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_inductor import undecorated
from problems import column_mask, draw_mask, kept, packed
from slope_compile.pattern import Pattern
from tolerances import UNIT_ROUNDOFF, relative_error
from triton_interpreter import close_gaps

DTYPE = torch.bfloat16


def main(path: str) -> int:
    close_gaps()
    torch.manual_seed(0)
    for case in json.loads(Path(path).read_text()):
        with tempfile.TemporaryDirectory() as folder:
            check(case, undecorated(case["source"], Path(folder)))
        print(case["name"], case["M"], case["N"], case["K"], "right")
    return 0


def check(case: dict[str, Any], kernel: Any) -> None:
    M, N, K = case["M"], case["N"], case["K"]
    mask = draw_mask(N, K, Pattern(2, 4))
    weight = torch.randn(N, K).to(DTYPE) * mask
    x, grad, bias, residual = (torch.randn(*size).to(DTYPE) for size in ((M, K), (M, N), (N,), (M, N)))
    columns = column_mask(weight, Pattern(2, 4))
    given = {"arg_X": x, "arg_DY": grad, "arg_V": kept(weight, mask), "arg_P": packed(mask), "arg_BIAS": bias}
    given["arg_C"] = packed(kept(columns, mask))
    names = kernel.arg_names if hasattr(kernel, "arg_names") else list(kernel.fn.__code__.co_varnames)
    names = names[: kernel.fn.__code__.co_argcount]
    outputs = [name for name in names if name.startswith("out_ptr")]
    others = [name for name in names if name.startswith("in_ptr")]
    if "turned" in case:
        assert "arg_X" not in names
        given[others.pop()] = x.t().contiguous()
        assert not others
    if "forward_step(" in case["source"]:
        truth, scale = product(x, weight.t())
        if case["bias"]:
            truth, scale = truth + bias.double(), scale + bias.double().abs()
        size = (M, N)
    elif "grad_input_sums(" in case["source"]:
        truth, scale = product(grad, weight * columns)
        size = (M, K)
    else:
        truth, scale = (kept(t, mask) for t in product(grad.t(), x))
        size = (N, K // 2)
    types: dict[str, str] = ast.literal_eval(re.findall(r"'signature': (\{.*?\})", case["source"])[0])
    results = {name: torch.full(size, torch.nan).to(DTYPE) for name in outputs if types[name] == "*bf16"}
    masks = {name: torch.zeros(size, dtype=torch.bool) for name in outputs if types[name] == "*i1"}
    given |= dict.fromkeys(others, residual) | results | masks
    pieces = -(-size[0] // 16) * -(-size[1] // 16)  # at least as many programs as tiles: the rest computes nothing
    kernel[(pieces,)](*(given[name] for name in names))
    expected = [truth]
    if others:
        rounded = truth.to(DTYPE).double()
        expected = [truth, rounded.clamp_min(0) + residual.double()]
        scale = scale + residual.double().abs()
    matched = [any(near(results[name], value, scale) for value in expected) for name in results]
    assert results
    assert all(matched), f"{case['name']} {size}: {matched}"
    if others:  # the fused result is there
        assert any(near(result, expected[1], scale) for result in results.values()), case["name"]
    for mask in masks.values():  # relu's own, for its gradient
        assert torch.equal(mask, truth.to(DTYPE) <= 0), case["name"]


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, and the sums of the magnitudes."""
    return a.double() @ b.double(), a.double().abs() @ b.double().abs()


def near(result: Tensor, truth: Tensor, scale: Tensor) -> bool:
    # Two roundings to 16 bits, and the sums in float32 in between.
    return bool(result.isfinite().all()) and relative_error(result, truth, scale) <= 2.5 * UNIT_ROUNDOFF[DTYPE]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
