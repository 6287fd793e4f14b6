"""The benchmarks: timing on clocks that do what they are told, every kind of CPU case once, the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from pathlib import Path

import pytest
import torch

import benchmark_tools
from benchmark_tools import run_cases
from benchmarks import __main__ as command
from benchmarks import cases, compile_time, records, rotation, runner, select
from benchmarks.cases import Case, Options, compare
from benchmarks.timing import Contender, CpuStopwatch, Plan, Samples, Stopwatch, Summary, TimingError, measure, ratios
from slope_compile.kernels import ops

ROOT = Path(__file__).parents[1]
MANY = Plan(seconds=1e9, precision=0.0, max_rounds=6)
"""As many rounds as a test wants."""


class Clock:
    """A clock that goes on only when a contender runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, *seconds: float) -> Contender:
        """Takes these times in turn, by call."""
        times = itertools.cycle(seconds)

        def call(index: int) -> None:
            self.calls.append((name, index))
            self.now += next(times)

        return call

    def measure(self, plan: Plan, **contenders: Contender) -> Samples:
        return measure(contenders, plan, CpuStopwatch(self), now=self)


# --- timing ----------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_in_alternating_order_and_indices_never_repeat() -> None:
    clock = Clock()
    samples = clock.measure(MANY, a=clock.contender("a", 1.0), b=clock.contender("b", 2.0))
    assert samples.rounds == {"a": [1.0] * 6, "b": [2.0] * 6}
    assert [index for _, index in clock.calls] == list(range(len(clock.calls)))
    # A warm-up call and one to find the number of repeats, then the rounds.
    assert "".join(name for name, _ in clock.calls) == "ab" + "ab" + "abba" * 3


def test_ratios_are_taken_within_rounds() -> None:
    # The machine becomes ten times slower half-way: ratios of rounds do not see it, ratios of means would.
    clock = Clock()
    drift = [1.0, 1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 10.0]
    samples = clock.measure(
        MANY, dense=clock.contender("dense", *(2 * d for d in drift)), ours=clock.contender("ours", *drift)
    )
    assert ratios(samples.rounds["dense"], samples.rounds["ours"]) == [2.0] * 6


def test_a_short_call_is_repeated_until_the_sample_is_long_enough() -> None:
    clock = Clock()
    plan = dataclasses.replace(MANY, max_rounds=1)
    samples = clock.measure(plan, short=clock.contender("short", 1e-6))
    assert samples.rounds["short"] == [pytest.approx(1e-6)]
    calls = len(clock.calls)
    samples = clock.measure(plan, short=clock.contender("short", 1e-6))
    assert len(clock.calls) - calls > CpuStopwatch.shortest / 1e-6


def test_a_clock_that_sees_nothing_is_an_error_and_never_a_zero() -> None:
    clock = Clock()
    with pytest.raises(TimingError, match="nothing: 65536 calls take less than"):
        clock.measure(MANY, nothing=clock.contender("nothing", 0.0))
    # Long enough at first, then nothing: coarse clocks do that.
    with pytest.raises(TimingError, match=r"odd: 1 calls took 0\.0 s"):
        clock.measure(MANY, odd=clock.contender("odd", 1.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("plan", "seconds", "rounds"),
    [
        pytest.param(Plan(seconds=50.0, precision=0.0), (10.0,), 5, id="budget"),
        pytest.param(Plan(seconds=5.0), (10.0,), 3, id="at least three"),
        pytest.param(Plan(seconds=1e9), (10.0,), 9, id="settled"),
        pytest.param(Plan(seconds=1e9), (10.0, 20.0, 30.0), 60, id="never settled"),
    ],
)
def test_number_of_rounds(plan: Plan, seconds: tuple[float, ...], rounds: int) -> None:
    clock = Clock()
    samples = clock.measure(plan, one=clock.contender("one", *seconds))
    assert len(samples.rounds["one"]) == rounds


def test_summary() -> None:
    assert Summary.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(3.0, 2.0, 4.0, 1.0, 5.0, 5)
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0, 7.0, 7.0, 1)
    assert Summary.of([1.0, 3.0]).uncertainty == pytest.approx(1.57 * 1.0 / 2**0.5 / 2.0)


def test_sums_are_taken_within_rounds() -> None:
    samples = Samples({"a": [1.0, 10.0], "b": [3.0, 30.0], "c": [2.0, 5.0], "d": [2.0, 5.0]})
    found = compare("step", samples, {"dense": ["a", "b"], "ours": ["c", "d"]}, ["dense"], {})
    assert found.seconds["dense"] == Summary.of([4.0, 40.0])
    assert found.speedup == {"dense": {}, "ours": {"dense": Summary.of([1.0, 4.0])}}


def test_copies_exceed_the_cache_several_times() -> None:
    assert rotation.copies(1 << 20, 32 << 20) == 128
    assert rotation.copies(1 << 30, 32 << 20) == 2
    assert rotation.copies(1 << 14, 60 << 20) == 512
    assert rotation.cache_bytes(torch.device("cpu")) >= 1 << 20


# --- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", cases.SUITES)
@pytest.mark.parametrize("tiny", [False, True])
def test_every_case_has_an_id_of_its_own(suite: str, tiny: bool) -> None:
    found = cases.cases(suite, Options(tiny=tiny))
    assert len({c.id for c in found}) == len(found) > 0


def test_options_choose_cases() -> None:
    ids = [c.id for c in cases.cases("cpu", Options(threads=(2,), dtypes=("float32",), layers=3))]
    assert all(name.endswith("fp32/t2") for name in ids)
    assert "layer/4096x11008/m2048/fp32/t2" in ids
    assert "model/gpt2-l3/train/exact/fp32/t2" in ids
    assert "model/llama-300m-l3/decode/b8/fp32/t2" in ids


def test_an_unknown_suite_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such suite"):
        cases.cases("no such suite", Options())


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_tools.leave_uncompiled(monkeypatch)
    benchmark_tools.shrink_cache(monkeypatch)



@pytest.mark.slow
def test_compile_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes are timed alone; of one depth the whole compilation too, of which they are a part."""
    monkeypatch.setattr(compile_time, "ROUNDS", 1)
    monkeypatch.setattr(compile_time, "_empty_caches", contextlib.nullcontext)  # headers compiled once serve all tests
    one, two = run_cases("compile", ".*")
    assert [m.facts["layers"] for m in (one, two)] == [1, 2]
    assert two.facts["nodes"] > one.facts["nodes"] > 50
    assert (one.facts["linears"], two.facts["linears"]) == (4, 11), "all but the first three and the head"
    assert one.seconds["compilation"].median > one.seconds["passes"].median > 0
    assert "compilation" not in two.seconds


@pytest.mark.parametrize("folder", [None, "somewhere"])
def test_compilation_is_timed_in_an_empty_folder(folder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    if folder is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, folder)
    with compile_time._empty_caches():
        inside = Path(os.environ[name])
        assert list(inside.iterdir()) == []
    assert not inside.exists()
    assert os.environ.get(name) == folder


def test_layer_cases(uncompiled: None) -> None:
    found = run_cases("cpu", r".*/64x64/.*")
    assert {m.name for m in found} == {"forward", "grad_input", "grad_weight", "step", "columns"}
    assert all(summary.median > 0 and summary.n == 2 for m in found for summary in m.seconds.values())
    for m in found:
        if m.name != "columns":
            assert set(m.speedup["dense"]) == {"compiled"}
            assert all(set(m.speedup[name]) == {"dense", "compiled"} for name in m.seconds if name.startswith("slope"))
            assert all(0 <= error < 1e-2 for error in m.facts.get("errors", {}).values())
    errors = {name for m in found for name in m.facts.get("errors", ())}
    assert errors == {"forward", "grad_input_exact", "grad_input_double_pruned", "grad_weight"}


def test_wrong_numbers_are_not_timed(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "grad_weight", lambda grad, x, *_: grad.new_zeros(64, 32))
    with pytest.raises(ArithmeticError, match="grad_weight"):
        run_cases("cpu", r"layer/64x64/m16/fp32/t1")


def test_training_cases(uncompiled: None) -> None:
    pytest.importorskip("transformers")
    found = run_cases("cpu", r"model/(demo|gpt2|llama-300m)/train/(double_pruned/fp32|exact/autocast)/t1")
    assert len(found) == 6
    for m in found:
        ours = select.ours(dataclasses.asdict(m))
        sparse, dense = (m.facts["state"][name]["linears"] for name in (ours, "dense"))
        assert sum(sparse.values()) < 0.53 * sum(dense.values())
        assert all(dense[part] for part in ("weights", "gradients", "moments"))
        assert m.facts["sparse_linears"] > 4
        assert all(loss < 8 for loss in m.facts["loss"].values())


def test_decode_cases(uncompiled: None) -> None:
    pytest.importorskip("transformers")
    found = run_cases("cpu", r"model/(gpt2|llama-300m)/decode/b8/.*")
    assert len(found) == 4
    assert all(set(m.speedup["slope"]) == {"dense", "frozen"} for m in found)
    assert {m.facts["tokens"] for m in found} == {8}


@pytest.mark.slow
def test_cases_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(rotation, "cache_bytes", lambda _: 1 << 14)
    found = run_cases("cpu", r"layer/64x64/m16/fp32/t1|model/gpt2/(train/double_pruned|decode/b1)/fp32/t1")
    assert [m.name for m in found] == ["forward", "grad_input", "grad_weight", "step", "train", "decode"]


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_runs_resumes_and_lists(
    tmp_path: Path, uncompiled: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--suite", "cpu", "--tiny", "--threads", "1", "--only", r"layer/64x64/(columns|m1)/fp32"]
    assert command.main([*words, "--list"]) == 0
    assert capsys.readouterr().out.split() == ["layer/64x64/columns/fp32/t1", "layer/64x64/m1/fp32/t1"]
    words += ["--case-seconds", "0.01", "--out", str(tmp_path)]
    assert command.main(words) == 0
    assert "2 done, 0 failed, 0 done before, 0 left" in capsys.readouterr().out
    assert command.main(words) == 0
    assert "0 done, 0 failed, 2 done before, 0 left" in capsys.readouterr().out
    recorded = records.read(tmp_path)[0]["command"]
    assert recorded.startswith("python -m benchmarks run --suite cpu --only ")
    assert str(tmp_path) not in recorded
    assert command.main([*words, "--out", str(tmp_path / "late"), "--budget", "0"]) == 130


def test_several_suites_share_the_minutes(
    tmp_path: Path, uncompiled: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[runner.Job] = []

    def execute(job: runner.Job, found: list[Case]) -> runner.Outcome:
        given.append(job)
        return runner.Outcome(done=len(found))

    monkeypatch.setattr(runner, "execute", execute)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    words = ["run", "--suite", "memory", "model", "--tiny", "--minutes", "2", "--out", str(tmp_path)]
    assert command.main(words) == 0
    assert [job.suite for job in given] == ["memory", "model"]
    assert [job.allowance for job in given] == [60.0, 120.0]
    assert given[0].command == "python -m benchmarks run --suite memory model --minutes 2.0 --tiny"
    words[words.index("2")] = "3"
    assert command.main([*words, "--minutes", "5", "1.5"]) == 0
    assert [job.allowance for job in given[2:]] == [300.0, 390.0], "what the first has left over is the second's"
    with pytest.raises(SystemExit):
        command.main([*words, "--minutes", "1", "2", "3"])
    assert "one for each of 2 suites" in capsys.readouterr().err
    count = sum(len(cases.cases(suite, Options(tiny=True))) for suite in ("memory", "model"))
    assert command.main(words) == 0
    assert f"{count} done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["run", "--suite", "cpu", "--only", "no such case"], "matches no case", id="only"),
        pytest.param(["run", "--suite", "cpu", "--only", "("], "not a regular expression", id="regex"),
        pytest.param(["run", "--suite", "speed"], "invalid choice: 'speed'", id="suite"),
        pytest.param(["run", "--suite", "cpu", "--threads", "0"], "expected 1 or more", id="threads"),
        pytest.param(["report", "no/such/folder"], "has no results", id="folder"),
    ],
)
def test_an_unusable_command_is_explained(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(words)
    assert message in capsys.readouterr().err


def test_paths_are_taken_out_of_tracebacks() -> None:
    text = f'File "{ROOT}/benchmarks/x.py"\nFile "{Path(torch.__file__).parent}/y.py"\nFile "{Path.home()}/z.py"'
    clean = records.without_paths(text)
    assert clean.splitlines()[0] == 'File "./benchmarks/x.py"'
    assert clean.splitlines()[1] == 'File "<packages>/torch/y.py"'
    assert clean.splitlines()[2] == 'File "<home>/z.py"'


def test_a_stopwatch_is_what_the_protocol_says() -> None:
    watch: Stopwatch = CpuStopwatch()
    assert watch.seconds([lambda: sum(range(1000))]) > 0
