"""The suite correctness, profiles, and runs with nothing but torch installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmark_tools
from benchmark_tools import CPU, QUICK, run_cases
from benchmarks import (
    __main__ as command,
)
from benchmarks import (
    cases,
    correctness,
    limits,
    model_checks,
    profiling,
    records,
    suite_tests,
)
from benchmarks.cases import Options, Run
from benchmarks.choices import Choice
from benchmarks.timing import CpuStopwatch
from slope_compile.kernels import (
    cpu_rules,
    gpu_rules,
    ops,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_tools.shrink_cache(monkeypatch)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_tools.leave_uncompiled(monkeypatch)


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> limits.Limits:
    return benchmark_tools.give_limits(monkeypatch)


# --- correctness -----------------------------------------------------------------------------------------------------


def test_products_are_checked_in_every_way() -> None:
    for m in run_cases("correctness", r"correctness/products/m5/76x140/(bf16|fp32)/t1"):
        assert m.facts["passed"], m.facts["checks"]
        ways = {way for way in correctness.WAYS for name in m.facts["checks"] if name.endswith(f"({way})")}
        assert ways == set(correctness.WAYS)
        assert "forward: expanded" in m.facts["checks"]


def test_a_forced_way_is_taken_and_given_back() -> None:
    before = gpu_rules.takes_triton, cpu_rules.sparse, gpu_rules.way, gpu_rules.fingerprint
    call = ("forward", 1, 4, 4, torch.float32, "GPU")
    with correctness.forced("mma_sp"):
        assert gpu_rules.takes_triton(*call) is True
        assert gpu_rules.way(*call, ("triton", "mma_sp", "expanded")) == "mma_sp"
        assert gpu_rules.way(*call, ("triton", "expanded")) == "expanded", "where it cannot be"
        assert gpu_rules.fingerprint("GPU") == "forced mma_sp"
    with correctness.forced("expanded"):
        assert cpu_rules.sparse("forward", 64, 768, 768, torch.float32, "avx2") is False
    assert (gpu_rules.takes_triton, cpu_rules.sparse, gpu_rules.way, gpu_rules.fingerprint) == before
    assert {setting.way for setting in model_checks.SETTINGS} == {None, *gpu_rules.WAYS}, "every way in a model"
    assert all(2 * setting.tokens <= 8 for setting in model_checks.SETTINGS if setting.way == "few")


def test_a_wrong_product_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *rest: right(x, *rest) * 1.02)
    (m,) = run_cases("correctness", r"correctness/products/m5/76x140/bf16/t1")
    assert not m.facts["passed"]
    assert not m.facts["checks"]["forward: linear (rule)"]["passed"]
    assert m.facts["checks"]["grad_weight: kept (rule)"]["passed"]


def test_what_raises_does_not_pass() -> None:
    def fails() -> Any:
        raise RuntimeError("no image")

    truth = (torch.ones(1), torch.ones(1), torch.ones(1), 1)
    checked = correctness._checked(Choice("forward", "x", "forward", fails), {"forward": truth})
    assert checked == {"passed": False, "raised": "RuntimeError: no image"}


def test_sums_in_sequence_pass_in_float32_and_wrong_ones_do_not() -> None:
    """A kernel may add up one term after the other; a term that it leaves out, or factors rounded to fewer
    bits, are far from that."""
    a, b = torch.randn(24, 2048), torch.randn(24, 2048)
    exact, scale = (a.double() * b.double()).sum(1), (a.double() * b.double()).abs().sum(1)
    # As good as a dense product can be.
    dense = exact.float()

    def passes(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> bool:
        terms, total = (x.double() * y.double()).to(dtype), torch.zeros(len(x), dtype=dtype)
        for term in terms.unbind(1):
            total += term
        passed: bool = correctness.judged(total.float(), dense, exact, scale, a.shape[1])["passed"]
        return passed

    assert passes(a, b)
    assert not passes(a[:, :-1], b[:, :-1]), "a term less"
    assert not passes((a.view(torch.int32) & -(1 << 13)).view(torch.float32), b), "ten bits"
    assert not passes(a, b, torch.bfloat16)


def test_models_are_compared_gradient_by_gradient(uncompiled: None) -> None:
    """Uncompiled, so that the exact gradient is what runs."""
    setting = model_checks.Setting("gpt", "bfloat16", None, "exact")
    (m,) = model_checks._run(setting, Options(tiny=True), correctness.forced, Run(QUICK, CpuStopwatch()))
    assert m.facts["passed"], m.facts["errors"]
    assert m.facts["errors"]["gradients"]["slope"] > 0
    with pytest.raises(ArithmeticError, match="some parameters only: b"):
        model_checks._error({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


@pytest.mark.slow
def test_cases_are_shared_out_among_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    only = "products/m5/76x140/(bf16|fp32)|products/m1/64x64/bf16"
    words = ["run", "--suite", "correctness", "--tiny", "--only", only, "--jobs", "2", "--out", str(tmp_path)]
    assert command.main([*words, "--minutes", "4"]) == 0
    assert "3 done, 0 failed, 0 done before, 0 left" in capfd.readouterr().out.splitlines()[-1]
    found = records.read(tmp_path)
    assert {record["case"].rpartition("/t")[0] for record in found} == {
        "correctness/products/m5/76x140/bf16", "correctness/products/m5/76x140/fp32",
        "correctness/products/m1/64x64/bf16",
    }  # fmt: skip
    assert command.main(words) == 0, "nothing is left to do"
    assert "0 done, 0 failed, 3 done before, 0 left" in capfd.readouterr().out


def test_what_matters_is_checked_first() -> None:
    ids = [case.id for case in cases.cases("correctness", Options())]
    models = [name for name in ids if "/model/" in name]
    assert {name.split("/")[4] for name in models[:4]} == {"rule", "triton", "wgmma_sp", "expanded"}
    assert set(models[:4]) <= set(ids[:14])
    found = [name.rsplit("/", 3)[1:3] for name in ids[:14] if "/products/" in name]
    assert sorted(dtype for _, dtype in found) == ["bf16"] * 4 + ["fp16"] * 4 + ["fp32"] * 2


@pytest.mark.slow
def test_model_checks_compiled() -> None:
    (m,) = run_cases("correctness", "correctness/model/.*")
    assert m.facts["passed"], m.facts["errors"]


# --- profiles --------------------------------------------------------------------------------------------------------


def test_a_profile_is_a_note(tmp_path: Path, uncompiled: None, known_limits: limits.Limits,
                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    words = ["profile", "--suite", "layer", "--case", "layer/tiny-llama/forward/m4", "--tiny", "--out", str(tmp_path)]
    assert command.main(words) == 0
    (path,) = tmp_path.iterdir()
    assert str(path) in capsys.readouterr().out
    text = path.read_text()
    for contender in ("dense", "slope", "slope_adapters"):
        assert re.search(rf"^## {contender}: \d+\.\d+ ms$", text, re.MULTILINE)
    assert "`slope::expand`" in text.split("## slope:")[1].split("## slope_adapters")[0]
    assert "`python -m benchmarks profile --suite layer --case layer/tiny-llama/forward/m4 --tiny`" in text
    with pytest.raises(SystemExit):
        command.main([*words[:4], "no such case", "--tiny"])


def test_own_times_are_those_of_a_call() -> None:
    a = torch.randn(64, 64)
    found = profiling.kernels(lambda _: a @ a, CPU)
    assert next(kernel for kernel in found if kernel.name == "aten::mm").calls == 1


# --- with nothing but torch ------------------------------------------------------------------------------------------

BARE = """
import importlib.machinery
import sys
missing = {"tabulate", "tqdm", "matplotlib", "transformers", "pytest"}
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in missing else find(name, *rest)
)
import torch
torch.compile = lambda function, **_: function
from benchmarks import __main__, rotation
rotation.cache_bytes = lambda _: 1 << 14
status = __main__.main(sys.argv[1:])
assert not missing & set(sys.modules), missing & set(sys.modules)
sys.exit(status)
"""


@pytest.mark.slow
def test_suites_run_with_nothing_but_torch(tmp_path: Path) -> None:
    only = "products/m5/76x140/bf16|64x64/m1/bf16|tiny-opt/(state/bf16|decode/b1|train/m4)"
    words = ["--suite", "correctness", "kernels", "layer", "model", "memory", "--tiny", "--threads", "1"]
    words += ["--only", only, "--case-seconds", "0", "--out", str(tmp_path), "--minutes", "5"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, "run", *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 done, 0 failed, 0 done before, 0 left" in done.stdout
    assert re.search(r"\[1/1, \d+ s\] correctness/products/m5/76x140/bf16/t1", done.stderr)


PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly")
SOME = """
import time
def test_right(): pass
def test_wrong(): assert False
def test_slow(): time.sleep({})
"""


@pytest.mark.parametrize(
    ("limit", "last", "counts", "said"),
    [(60, 0, {"passed": 2, "failed": 1}, "test_wrong"), (6, 60, {"passed": 1, "failed": 1}, "not over after 6 s")],
)
def test_the_suites_own_tests(tmp_path: Path, limit: float, last: int, counts: dict[str, int], said: str) -> None:
    """Of a run that is cut off, what it had shown counts."""
    (tmp_path / "test_some.py").write_text(SOME.format(last))
    facts = suite_tests.tested([*PYTEST, "--rootdir", str(tmp_path), str(tmp_path)], limit).facts
    assert (facts["tests"], facts["passed"]) == (counts, False)
    assert said in facts["output"]


def test_no_test_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no test ran"):
        suite_tests.tested([*PYTEST, "--rootdir", str(tmp_path), str(tmp_path)], 30.0)
