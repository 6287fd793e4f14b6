"""The runner of the benchmarks: what it skips, records, stops and leaves for another run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark_tools
import machine
from benchmarks import __main__ as command
from benchmarks import records, runner
from benchmarks.cases import Case, Measurement, Run, compare
from benchmarks.timing import Samples

ROOT = Path(__file__).parents[1]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_tools.leave_uncompiled(monkeypatch)
    benchmark_tools.shrink_cache(monkeypatch)


def constant(name: str, dense: float, ours: float) -> Measurement:
    facts = {"shape": {"M": 4, "N": 8, "K": 16}, "dtype": "float32"}
    return compare(name, Samples({"dense": [dense] * 3, "slope": [ours] * 3}), {"dense": ["dense"], "slope": ["slope"]},
                   ["dense"], facts)  # fmt: skip


def case(name: str, *problems: BaseException | None, done: list[str] | None = None) -> Case:
    """Each time it is run it meets the next problem, if that is one."""
    remaining = iter(problems)

    def run(_: Run) -> Iterator[Measurement]:
        problem = next(remaining, None)
        if problem is not None:
            raise problem
        if done is not None:
            done.append(name)
        yield constant("forward", 4.0, 2.0)
        yield constant("grad_weight", 4.0, 1.0)

    return Case(name, run, threads=1)


@pytest.fixture
def job(tmp_path: Path) -> runner.Job:
    return runner.Job("cpu", tmp_path, "python -m benchmarks run", lambda: machine.describe(torch.device("cpu")))


def results(job: runner.Job) -> list[records.Record]:
    return records.read(job.out)


def test_a_failing_case_is_recorded_and_the_others_are_not_lost(job: runner.Job) -> None:
    outcome = runner.execute(job, [case("a"), case("b", ValueError("bad luck")), case("c")])
    assert outcome == runner.Outcome(done=2, failed=1)
    found = results(job)
    assert [(r["case"], r["status"]) for r in found] == [
        ("a", "ok"), ("a", "ok"), ("b", "failed"), ("c", "ok"), ("c", "ok"),
    ]  # fmt: skip
    error = found[2]["error"]
    assert "Traceback" in error
    assert "ValueError: bad luck" in error
    assert str(ROOT) not in error
    assert {"suite", "case", "date", "command", "threads", "took", "environment"} <= found[2].keys()


def test_a_record_says_where_it_comes_from(job: runner.Job) -> None:
    runner.execute(job, [case("a")])
    record = results(job)[0]
    assert {"device", "capability", "features", "torch", "triton", "python", "commit", "dirty"} <= (
        record["environment"].keys()
    )
    assert record["seconds"]["dense"] == {"median": 4.0, "low": 4.0, "high": 4.0, "min": 4.0, "max": 4.0, "n": 3}
    assert record["speedup"]["slope"]["dense"]["median"] == 2.0


def test_finished_cases_are_skipped_and_failed_ones_tried_again(job: runner.Job) -> None:
    done: list[str] = []
    todo = [case("a", done=done), case("b", ValueError("bad luck"), done=done)]
    runner.execute(job, todo)
    assert runner.execute(job, [*todo, case("c", done=done)]) == runner.Outcome(done=2, skipped=1)
    assert done == ["a", "b", "c"]
    # The failure is still in the file, and does not count any more.
    assert "bad luck" in (job.out / records.FILE).read_text()
    assert all(record["status"] == "ok" for record in results(job))


def test_an_interrupt_leaves_a_file_to_go_on_from(job: runner.Job) -> None:
    todo = [case("a"), case("b", KeyboardInterrupt()), case("c")]
    assert runner.execute(job, todo) == runner.Outcome(done=1, left=2)
    assert [record["case"] for record in results(job)] == ["a", "a"]
    assert runner.execute(job, todo) == runner.Outcome(done=2, skipped=1)


def test_half_a_line_is_left_out_and_not_continued(job: runner.Job) -> None:
    runner.execute(job, [case("a"), case("b")])
    path = job.out / records.FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    assert runner.execute(job, [case("a"), case("b")]) == runner.Outcome(done=1, skipped=1)
    assert [record["case"] for record in results(job)] == ["a", "a", "b", "b"]


def test_no_case_begins_after_the_budget(job: runner.Job) -> None:
    clock = itertools.count(0.0, 10.0)
    outcome = runner.execute(dataclasses.replace(job, budget=15.0), [case("a"), case("b")], now=lambda: next(clock))
    assert outcome == runner.Outcome(done=1, left=1)


def test_a_case_that_needs_more_than_is_left_is_left_for_another_run(job: runner.Job) -> None:
    clock = itertools.count(0.0, 10.0)
    long, short = (dataclasses.replace(case(name), needs=needs) for name, needs in (("long", 90.0), ("short", 1.0)))
    bounded = dataclasses.replace(job, allowance=60.0)
    assert runner.execute(bounded, [long, short], now=lambda: next(clock)) == runner.Outcome(done=1, left=1)
    assert {record["case"] for record in results(job)} == {"short"}


def test_a_case_that_runs_when_time_is_up_is_left_and_not_failed(job: runner.Job) -> None:
    def forever(_: Run) -> Iterator[Measurement]:
        while True:
            with contextlib.suppress(Exception):  # Not even a case that takes errors lightly goes on.
                while True:
                    pass
        yield

    bounded = dataclasses.replace(job, allowance=0.3)
    assert runner.execute(bounded, [Case("endless", forever, threads=1), case("b")]) == runner.Outcome(left=2)
    assert results(job) == []


def test_a_check_that_does_not_pass_is_counted_as_failed_and_keeps_its_record(job: runner.Job) -> None:
    def wrong(_: Run) -> Iterator[Measurement]:
        yield Measurement("correctness", {}, {}, {"passed": False, "checks": {}})

    assert runner.execute(job, [Case("a", wrong, threads=1)]) == runner.Outcome(failed=1)
    assert results(job)[0]["status"] == "ok"


def test_failed_cases_are_left_alone_when_asked(job: runner.Job) -> None:
    todo = [case("a", ValueError("bad luck"))]
    runner.execute(job, todo)
    assert runner.execute(dataclasses.replace(job, retry=False), todo) == runner.Outcome(skipped=1)


def test_a_device_that_answers_no_more_ends_the_process(job: runner.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_answers", lambda _: False)
    with pytest.raises(runner.BrokenDevice, match="after b"):
        runner.execute(job, [case("a"), case("b", RuntimeError("illegal memory access")), case("c")])
    # The failure is recorded, so that the next process knows which case to leave alone.
    assert [(r["case"], r["status"]) for r in results(job)][-1] == ("b", "failed")


def test_the_next_process_goes_on_without_the_case_that_broke_the_device(
    tmp_path: Path, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []

    def broken(*_: Any) -> runner.Outcome:
        raise runner.BrokenDevice("cuda answers no more after x")

    def execv(_: str, words: list[str]) -> None:
        begun.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(runner, "execute", broken)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    words = ["run", "--suite", "cpu", "layer", "--tiny", "--threads", "1", "--minutes", "7", "2"]
    words += ["--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        command.main(words)
    assert begun[0][1:] == ["-m", "benchmarks", *words, "--no-retry", "--minutes", "7.00", "2.00"]


def test_numbers_that_json_has_not_are_written_as_text(job: runner.Job) -> None:
    def infinite(_: Run) -> Iterator[Measurement]:
        yield Measurement("x", {}, {}, {"error": float("inf"), "ratio": 1 / 3, "sizes": (1, 2)})

    runner.execute(job, [Case("a", infinite, threads=1)])
    assert results(job)[0]["facts"] == {"error": "inf", "ratio": 0.333333, "sizes": [1, 2]}


def test_a_case_over_its_limit_fails(job: runner.Job) -> None:
    def forever(_: Run) -> Iterator[Measurement]:
        while True:
            pass
        yield

    endless = Case("endless", forever, threads=1, limit=0.2)
    assert runner.execute(job, [endless, case("b")]) == runner.Outcome(done=1, failed=1)
    assert "TimeoutError" in results(job)[0]["error"]


def test_what_is_no_longer_compiled_is_not_timed(job: runner.Job) -> None:
    def run(_: Run) -> Iterator[Measurement]:
        def scaled(x: torch.Tensor, factor: int) -> torch.Tensor:
            return x * factor

        with torch._dynamo.config.patch(recompile_limit=1):
            compiled = torch.compile(scaled, backend="eager", dynamic=False)
            for factor in range(3):
                compiled(torch.ones(2), factor)
        yield constant("forward", 1.0, 1.0)

    assert runner.execute(job, [Case("a", run, threads=1)]) == runner.Outcome(failed=1)
    assert "FailOnRecompileLimitHit" in results(job)[0]["error"]


def test_threads_are_those_of_the_case(job: runner.Job) -> None:
    before = torch.get_num_threads()
    seen = []

    def run(_: Run) -> Iterator[Measurement]:
        seen.append(torch.get_num_threads())
        yield constant("forward", 1.0, 1.0)

    runner.execute(job, [Case("a", run, threads=before + 1)])
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
