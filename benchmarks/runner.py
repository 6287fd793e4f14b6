"""Runs cases one after the other: skips what is done, records what fails, leaves a usable file when interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import threading
import time
import traceback
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import records
from benchmarks.cases import Case, Run
from benchmarks.timing import Plan


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How many cases ended how."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    """Finished by an earlier run."""
    left: int = 0
    """Not begun, or not finished: interrupted, or out of budget."""

    def __str__(self) -> str:
        return f"{self.done} done, {self.failed} failed, {self.skipped} done before, {self.left} left"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do with the cases."""

    suite: str
    out: Path
    """Folder of the results."""
    command: str
    """For the records: how to repeat the run."""
    environment: Callable[[], dict[str, Any]]
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    budget: float | None = None
    """Seconds after which no case begins."""
    seconds: float | None = None
    """Budget of each case instead of its own."""


def execute(job: Job, cases: Sequence[Case], now: Callable[[], float] = time.monotonic) -> Outcome:
    """Run the cases that the results folder does not have yet.  Ctrl-C ends it; the case in progress is lost."""
    path = job.out / records.FILE
    had = records.finished(records.read(path))
    todo = [case for case in cases if case.id not in had]
    outcome = Outcome(skipped=len(cases) - len(todo), left=len(todo))
    begun = now()
    with tqdm(total=len(todo), unit="case", dynamic_ncols=True) as bar, contextlib.suppress(KeyboardInterrupt):
        for case in todo:
            if job.budget is not None and now() - begun >= job.budget:
                tqdm.write(f"The budget of {job.budget:.0f} s is spent.")
                break
            bar.set_description_str(case.id)
            lines = _run(job, case)
            records.append(path, lines)
            failed = lines[-1]["status"] == "failed"
            if failed:
                tqdm.write(f"{case.id} failed: {lines[-1]['error'].strip().splitlines()[-1]}")
            outcome = dataclasses.replace(
                outcome,
                done=outcome.done + (not failed),
                failed=outcome.failed + failed,
                left=outcome.left - 1,
            )
            bar.update()
    return outcome


def _run(job: Job, case: Case) -> list[records.Record]:
    """One case's records: its measurements, or its failure."""
    plan = Plan(seconds=case.seconds if job.seconds is None else job.seconds)
    common: records.Record = {
        "suite": job.suite,
        "case": case.id,
        "run": uuid.uuid4().hex[:12],
        "date": records.today(),
        "command": job.command,
        "threads": case.threads,
        "environment": job.environment(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    start = time.monotonic()
    try:
        with _threads(case.threads), _time_limit(case.limit):
            measurements = list(case.measure(Run.on(job.device, plan)))
        if not measurements:
            raise RuntimeError("the case yielded no measurement")
        took = {"took": round(time.monotonic() - start, 3)}
        lines = [records.measurement_record(common | took, measurement) for measurement in measurements]
    except Exception:
        took = {"took": round(time.monotonic() - start, 3)}
        lines = [records.failure_record(common | took, traceback.format_exc())]
    finally:
        # Compiled functions hold the weights of the case; the next one needs the memory.
        torch.compiler.reset()
        gc.collect()
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    return lines


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, where the system has alarms and this is the main thread.

    It comes between two steps of the interpreter: a call into a library is let run to its end.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: types.FrameType | None) -> None:
        raise TimeoutError(f"the case took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
