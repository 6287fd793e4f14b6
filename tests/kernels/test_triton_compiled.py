"""The Triton kernels as machine code: no spills, tensor cores used, shared memory that the GPU has.

A sample: every kernel, for two architectures, in its largest configuration.  All of them:
``python tests/triton_offline.py``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slope_compile.kernels import triton_configs
from triton_offline import KERNELS, SHARED_MEMORY, Build, Result, builds, compile_offline

pytest.importorskip("triton")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_configuration(kernel: str, arch: int) -> None:
    config = triton_configs.configurations(kernel.removesuffix("_columns"), torch.bfloat16)[-1]
    build = Build(kernel, config, torch.bfloat16, arch, aligned=True)
    assert not compile_offline(build).problems(build)


def test_float32_on_tensor_cores_compiles_for_sm_90() -> None:
    # The form dY W of this product ends in an error of the compiler; the transposed one must not.
    config = triton_configs.configurations("grad_input", torch.float32)[-1]
    build = Build("grad_input", config, torch.float32, 90, aligned=True, precision="tf32")
    assert not compile_offline(build).problems(build)


def test_a_bad_kernel_is_noticed() -> None:
    build = next(builds((90,), (torch.bfloat16,)))
    build = dataclasses.replace(build, config=dataclasses.replace(build.config, BM=64))
    assert Result(0, 100, 1024, frozenset({"HGMMA"})).problems(build) == []
    bad = Result(2, 255, SHARED_MEMORY[90] + 1, frozenset({"HMMA"}))
    assert len(bad.problems(build)) == 3
