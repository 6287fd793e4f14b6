"""Machine code of the CPU kernels, where nothing else tells: without their prefetches products are right, but slow."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from slope_compile.kernels import cpu_build
from slope_compile.kernels.cpu_build import COMMON_FLAGS, FLAGS, SOURCE

PREFETCHING = {
    "avx2": ("grad_input_few", "add_rows_of", "dot_rows", "ForwardLists", "ColumnLists"),
    "avx512_bf16": ("grad_input_few", "grad_input_pairs", "ForwardSlots", "ColumnSlots", "grad_weight_lanes"),
}
"""Level -> functions with loops that ask for memory before its turn."""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels named are those of x86")
@pytest.mark.parametrize("level", PREFETCHING)
def test_prefetches_are_there(level: str, tmp_path: Path) -> None:
    """Calls of a function that only prefetches are dropped as having no effect, unless it is inlined early."""
    compiler = cpu_build.find_compiler()
    assert compiler is not None
    result = tmp_path / "kernels.s"
    flags = [flag for flag in COMMON_FLAGS if flag != "-shared"]
    subprocess.run([*compiler.command, *flags, *FLAGS[level], "-S", SOURCE, "-o", result], check=True)
    found = set()
    for function in re.split(r"^(?=_[\w.$]+:$)", result.read_text(), flags=re.MULTILINE):
        if "prefetch" in function:
            found.add(function.partition(":")[0])
    for name in PREFETCHING[level]:
        assert any(name in symbol for symbol in found), f"{name} has no prefetch"
