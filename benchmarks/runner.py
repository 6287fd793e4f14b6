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
import torch._dynamo

from benchmarks import progress, records
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

    def __add__(self, other: Outcome) -> Outcome:
        counts = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Outcome(*(a + b for a, b in counts))

    def __str__(self) -> str:
        return f"{self.done} done, {self.failed} failed, {self.skipped} done before, {self.left} left"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do with the cases of a suite."""

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
    allowance: float | None = None
    """Seconds after which everything must have ended: a case that needs more than is left is not begun, and one that
    is still running then is stopped and left for the next run."""
    retry: bool = True
    """Whether cases that failed in an earlier run are tried again."""


class BrokenDevice(Exception):
    """This process can no longer use the GPU: after an illegal access, every later call fails as well."""


class _OutOfTime(BaseException):
    """The time for the run is used up.  Not an Exception, so that a case that catches exceptions still ends."""


def execute(job: Job, cases: Sequence[Case], now: Callable[[], float] = time.monotonic) -> Outcome:
    """Run the cases that the results folder does not have yet.  Ctrl-C ends it; the case in progress is lost.

    Raises:
        BrokenDevice: a case failed and left the GPU unusable; its failure is recorded.
    """
    path = job.out / records.FILE
    had = records.finished(records.read(path), failed=not job.retry)
    todo = [case for case in cases if case.id not in had]
    outcome = Outcome(skipped=len(cases) - len(todo), left=len(todo))
    begun = now()
    with progress.bar(len(todo)) as bar, contextlib.suppress(KeyboardInterrupt, _OutOfTime):
        for case in todo:
            spent = now() - begun
            if job.budget is not None and spent >= job.budget:
                bar.say(f"The budget of {job.budget:.0f} s is spent.")
                break
            left = None if job.allowance is None else job.allowance - spent
            if left is not None and left <= case.needs:
                bar.say(f"{case.id} is left for another run: it needs {case.needs:.0f} s, {left:.0f} s are left")
                continue
            bar.begin(case.id)
            lines = _run(job, case, left)
            records.append(path, lines)
            failed = lines[-1]["status"] == "failed"
            wrong = any(line.get("facts", {}).get("passed") is False for line in lines)
            if failed:
                bar.say(f"{case.id} failed: {lines[-1]['error'].strip().splitlines()[-1]}")
            elif wrong:
                bar.say(f"{case.id}: checks did not pass; the report names them")
            outcome = dataclasses.replace(
                outcome,
                done=outcome.done + (not failed and not wrong),
                failed=outcome.failed + (failed or wrong),
                left=outcome.left - 1,
            )
            bar.end()
            if failed and not _answers(job.device):
                raise BrokenDevice(f"{job.device} answers no more after {case.id}")
    return outcome


def _answers(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False


def _run(job: Job, case: Case, left: float | None) -> list[records.Record]:
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
        with _threads(case.threads), _time_limit(case.limit, left), _compiled_or_error():
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
            with contextlib.suppress(RuntimeError):  # A broken device is noticed elsewhere.
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    return lines


def _compiled_or_error() -> contextlib.AbstractContextManager[None]:
    """Code that Dynamo recompiles too often would run eagerly, and be timed as if it were compiled."""
    patched: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    return patched


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _time_limit(seconds: float, left: float | None = None) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, where the system has alarms and this is the main thread.

    With less than that ``left`` in the whole run it is then that the block ends, by ``_OutOfTime``.

    It comes between two steps of the interpreter: a call into a library is let run to its end.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    ends_run = left is not None and left < seconds

    def stop(_signal: int, _frame: types.FrameType | None) -> None:
        if ends_run:
            raise _OutOfTime
        raise TimeoutError(f"the case took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left if left is not None and ends_run else seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
