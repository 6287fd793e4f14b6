"""Profiles of cases instead of timings: a note on which kernels each contender spends its time in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import records
from benchmarks.cases import Case, Run
from benchmarks.timing import Contender, Plan, Samples, stopwatch

CALLS = 10
MOST = 12
"""Rows of a table."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or one operator of a CPU."""

    name: str
    calls: float
    """In a call of the contender."""
    seconds: float
    """Likewise, its own time without what it calls."""


@dataclasses.dataclass(frozen=True)
class Profiler(Run):
    """A :class:`Run` that profiles its contenders; its samples are the profiled times."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    found: dict[str, list[Kernel]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device) -> Profiler:
        return cls(Plan(), stopwatch(device), device=device)

    def measure(self, contenders: Mapping[str, Contender], calls: int = 0) -> Samples:
        rounds = {}
        for name, contender in contenders.items():
            for index in range(3):
                contender(index)
            self.found[name] = kernels(contender, self.device)
            rounds[name] = [max(sum(kernel.seconds for kernel in self.found[name]), 1e-9)]
        return Samples(rounds)


def kernels(contender: Contender, device: torch.device) -> list[Kernel]:
    """The kernels of a call, those that take longest first."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for index in range(CALLS):
            contender(index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found = []
    for event in profiler.key_averages():
        on_device: Any = event
        if device.type == "cuda":
            # Operators appear a second time as what they launched: only what ran on the device counts.
            if event.device_type.name != "CUDA":
                continue
            microseconds = on_device.self_device_time_total
        else:
            microseconds = on_device.self_cpu_time_total
        if microseconds > 0:
            found.append(Kernel(event.key, event.count / CALLS, microseconds / 1e6 / CALLS))
    return sorted(found, key=lambda kernel: -kernel.seconds)


def note(case: Case, profiler: Profiler, environment: dict[str, Any], command: str) -> str:
    """The note's text, in Markdown."""
    lines = [f"# Where `{case.id}` spends its time", ""]
    versions = f"torch {environment['torch']}, Triton {environment['triton']}, commit {environment['commit']}"
    lines += [f"{environment['device']}; {versions}; {records.today()}; `{command}`.", ""]
    what = "kernels on the GPU" if profiler.device.type == "cuda" else "operators, own time"
    lines += [f"PyTorch's profiler over {CALLS} calls of each contender, warm; {what}, per call.", ""]
    for name, found in profiler.found.items():
        whole = sum(kernel.seconds for kernel in found)
        lines += [f"## {name}: {whole * 1e3:.3f} ms", "", "| kernel | calls | ms | share |", "|---|---|---|---|"]
        lines += [_row(kernel, whole) for kernel in found[:MOST]]
        rest = found[MOST:]
        if rest:
            lines.append(_row(Kernel(f"{len(rest)} others", 0, sum(k.seconds for k in rest)), whole))
        lines.append("")
    lines += ["What was tried, and what it gave: (to be written by whoever tried it)", ""]
    return "\n".join(lines)


def _row(kernel: Kernel, whole: float) -> str:
    name = kernel.name.replace("|", "\\|")
    name = name if len(name) <= 90 else name[:87] + "..."
    calls = f"{kernel.calls:g}" if kernel.calls else ""
    return f"| `{name}` | {calls} | {kernel.seconds * 1e3:.4f} | {kernel.seconds / whole:.1%} |"


def write(cases: Iterable[Case], folder: Path, device: torch.device, environment: dict[str, Any], command: str) -> list[
    Path
]:  # fmt: skip
    """Profile cases and write a note on each; a case that fails is left out, its error is printed."""
    written = []
    for case in cases:
        profiler = Profiler.of(device)
        threads = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        try:
            list(case.measure(profiler))
        except Exception as error:  # A case may fail for any reason; the others are still wanted.
            print(f"{case.id}: {type(error).__name__}: {error}")
        finally:
            torch.set_num_threads(threads)
            torch.compiler.reset()
        if profiler.found:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"profile-{_file_name(case.id, environment)}.md"
            path.write_text(note(case, profiler, environment, command), encoding="utf-8")
            written.append(path)
    return written


def _file_name(case_id: str, environment: dict[str, Any]) -> str:
    words: Sequence[str] = (case_id, str(environment["device"]))
    return "-".join("".join(c if c.isalnum() or c == "." else "-" for c in word).strip("-") for word in words)
