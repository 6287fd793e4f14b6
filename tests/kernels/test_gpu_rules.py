"""The choice between the Triton kernels and dense products, and what goes to neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from problems import every_dtype
from slope_compile.kernels import cache_files, gpu_ops, gpu_rules, gpu_tuning

OPS = tuple(gpu_rules.SHARE)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "cache_folder", lambda: tmp_path)
    gpu_tuning.load.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_win_where_the_weight_is_what_is_read(op: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert gpu_rules.takes_triton(op, 1, 4096, 4096, dtype, "some GPU")
        assert not gpu_rules.takes_triton(op, 1 << 16, 4096, 4096, dtype, "some GPU")
    assert not gpu_rules.takes_triton(op, 1, 4096, 4096, torch.float32, "some GPU")


def test_the_column_mask_is_among_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rules, "SHARE", dict.fromkeys(OPS, 0.5))

    def most_tokens(op: str) -> int:
        return max(M for M in range(1, 4096) if gpu_rules.roofline(op, M, 4096, 4096, torch.bfloat16))

    # Expanding W^{R,C} reads the mask too, so the kernel that needs no expansion stays ahead for longer.
    assert most_tokens("grad_input") < most_tokens("grad_input_columns") < 4095


@every_dtype
def test_what_the_kernels_do_not_take(dtype: torch.dtype) -> None:
    tensor = torch.ones(1, dtype=dtype)
    assert not gpu_ops.usable(1, 4, tensor)
    assert not gpu_ops.usable(2, 4, tensor, torch.ones(1, dtype=torch.float64))
    assert not gpu_ops.usable(2, 4, tensor.double())


def test_every_product_is_registered_for_cuda_and_importing_them_loads_no_triton() -> None:
    code = """
import sys, torch
from slope_compile.kernels import gpu_ops, ops
assert "triton" not in sys.modules
for name in gpu_ops.IMPLEMENTATIONS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"slope::{name}", "CUDA"), name
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


SWITCHES = {
    "pass": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'; torch.backends.fp32_precision = 'tf32'": "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}
"""How float32 products are told to use TF32 or not, one state of a process each -> what ours do."""


def test_float32_is_multiplied_as_pytorch_is_told_to() -> None:
    code = """
import os, sys, torch
from slope_compile.kernels import triton_products
for switch, expected in eval(sys.argv[1]).items():
    child = os.fork()
    if not child:
        exec(switch)
        found = triton_products.precision()
        print(switch, found, flush=True)
        os._exit(found != expected)
    assert os.waitpid(child, 0)[1] == 0, switch
"""
    subprocess.run([sys.executable, "-c", code, repr(SWITCHES)], check=True, timeout=600)
