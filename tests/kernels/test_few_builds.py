"""The kernel for few tokens as machine code: see ``few_offline``, which compiles all that the suite leaves out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from few_offline import Build, Result, builds, compile_offline, describe
from slope_compile.kernels import few_tokens
from triton_interpreter import interpreting
from triton_offline import SHARED_MEMORY, script

BF16, FP16 = torch.bfloat16, torch.float16
pytestmark = pytest.mark.skipif(interpreting(), reason="interpreted kernels are not compiled")

EACH = [Build(tokens, config, BF16, 90) for tokens, configs in few_tokens.CONFIGS.items() for config in configs]
OTHERS = [
    dataclasses.replace(EACH[0], arch=80, dtype=FP16),
    dataclasses.replace(EACH[-1], arch=80, aligned=False),
    dataclasses.replace(EACH[1], arch=100, bias=False),
    dataclasses.replace(EACH[-1], arch=120, dtype=FP16),
]


@pytest.mark.parametrize(
    "build", [*EACH, *OTHERS[:2], *(pytest.param(build, marks=pytest.mark.slow) for build in OTHERS[2:])], ids=str
)
def test_the_machine_code(build: Build) -> None:
    result = compile_offline(build)
    assert not result.problems(build)
    assert result.registers


def test_the_script_compiles_every_configuration_everywhere() -> None:
    found = list(builds(tuple(SHARED_MEMORY)))
    cases = {(b.tokens, b.config, b.dtype, b.arch, b.aligned, b.bias) for b in found}
    assert len(cases) == len(found) == len(EACH) * 2 * len(SHARED_MEMORY) * 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 3}, "3 spills"),
        ({"shared": 1 << 20}, "shared memory"),
        ({"wide": 0}, "16 bytes wide"),
        ({"flushing": 2}, "2 instructions flush"),
    ],
)
def test_problems_are_named(change: dict[str, int], problem: str) -> None:
    good = Result(spills=0, registers=100, shared=64, wide=12, narrow=4)
    assert not good.problems(EACH[0])
    assert problem in dataclasses.replace(good, **change).problems(EACH[0])[0]


def test_the_script_names_what_is_not_acceptable(capsys: pytest.CaptureFixture[str]) -> None:
    good = Result(spills=0, registers=100, shared=64, wide=12, narrow=4)
    results = {EACH[0]: good, EACH[1]: dataclasses.replace(good, spills=3)}
    assert script(lambda archs: results, results.__getitem__, describe, ["90"]) == 1
    fine, spilled, last = capsys.readouterr().out.splitlines()
    assert fine.endswith("[]")
    assert spilled.startswith(str(EACH[1]))
    assert "3 spills" in spilled
    assert last == "1 not acceptable"
    assert script(lambda archs: [EACH[0]], results.__getitem__, describe, []) == 0
