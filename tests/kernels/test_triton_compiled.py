"""The Triton kernels as machine code: no spills, tensor cores used, shared memory that the GPU has, wgmma in parallel.

In bfloat16 with aligned sizes: every configuration for sm_80 and sm_90, the largest for sm_100 and sm_120; by default,
the smallest and the largest for sm_90.  All dtypes and sizes that are not aligned: ``python tests/triton_offline.py``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slope_compile.kernels import triton_configs
from triton_offline import (
    KERNELS,
    SHARED_MEMORY,
    Build,
    Result,
    builds,
    compile_offline,
    compiled_with_log,
    configured,
)

pytest.importorskip("triton")


def acceptable(build: Build) -> bool:
    problems = compile_offline(build).problems(build)
    assert not problems, f"{build}: {problems}"
    return True


@pytest.mark.parametrize(
    ("arch", "ends"), [(90, True), *(pytest.param(arch, False, marks=pytest.mark.slow) for arch in (80, 90))]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration(kernel: str, arch: int, ends: bool) -> None:
    chosen = [b for b in builds((arch,), (torch.bfloat16,), (True,)) if b.kernel == kernel]
    assert chosen
    assert all(acceptable(build) for build in ([chosen[0], *chosen[1:][-1:]] if ends else chosen))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_configuration(kernel: str, arch: int) -> None:
    config = triton_configs.configurations(configured(kernel), torch.bfloat16, arch=arch)[-1]
    assert acceptable(Build(kernel, config, torch.bfloat16, arch, aligned=True))


def test_float32_on_tensor_cores_compiles_for_sm_90() -> None:
    # The form dY W of this product ends in an error of the compiler; the transposed one must not.
    config = triton_configs.configurations("grad_input", torch.float32, arch=90)[-1]
    assert acceptable(Build("grad_input", config, torch.float32, 90, aligned=True, precision="tf32"))


def test_a_bad_kernel_is_noticed() -> None:
    build = next(builds((90,), (torch.bfloat16,)))
    build = dataclasses.replace(build, config=dataclasses.replace(build.config, BM=64))
    assert Result(0, 100, 1024, frozenset({"HGMMA"})).problems(build) == []
    remark = ("(C7510) wgmma serialized",)
    bad = Result(2, 255, SHARED_MEMORY[90] + 1, frozenset({"HMMA"}), loop_loads=1, warnings=remark)
    assert len(bad.problems(build)) == 5


def test_what_ptxas_says_is_heard() -> None:
    """The log that serialization remarks would stand in arrives: it always has a line on registers."""
    import triton
    from triton.backends.compiler import GPUTarget

    from slope_compile.kernels import triton_conversions

    names = triton_conversions.expand.arg_names
    signature = dict.fromkeys(names, "i32") | {"V": "*bf16", "P": "*u8", "C": "*u8", "W": "*bf16"}
    constants = {"BN": 32, "BK": 64, "HAS_COLUMNS": True}
    source = triton.compiler.ASTSource(
        triton_conversions.expand, signature | dict.fromkeys(constants, "constexpr"), constants
    )
    _, log = compiled_with_log(source, GPUTarget("cuda", 90, 32), {"num_warps": 4})
    assert "registers" in log
