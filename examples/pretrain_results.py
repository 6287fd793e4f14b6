"""What the pretraining runs measured: figures, the table that compares them, the picture, the JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate

import machine
import slope_compile as slope
from training import Curves, Kind, Run, Settings

NAMES: dict[Kind, str] = {"dense": "dense", "slope": "SLoPe"}
_COLORS: dict[Kind, str] = {"dense": "tab:blue", "slope": "tab:orange"}


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one finished run; a figure that does not apply is None."""

    kind: Kind
    validation_loss: float
    """Nats per byte, after the last step."""
    tokens_per_second: float | None
    """Median over the steps without adapters, compile steps left out."""
    tokens_per_second_adapters: float | None
    """The same over the steps with adapters."""
    compile_seconds: float | None
    """Time of the first steps above a steady step's: what compiling cost, once per process."""
    recompile_seconds: float | None
    """The same for the first step with adapters."""
    linear_bytes: dict[str, int]
    """Weights, metadata, gradients, moments of the linears that are sparse in the SLoPe run."""
    adapter_bytes: int
    """All of that for the adapters."""
    model_bytes: int
    """All of that for the whole model, adapters included."""

    @property
    def perplexity(self) -> float:
        """Of a byte."""
        return math.exp(self.validation_loss)


def measure(run: Run, paths: Sequence[str]) -> Result:
    """The figures of a run that took its last step, with its gradients still in place.

    Args:
        run: The run. paths: Module paths of the linears that are sparse in the SLoPe run; the dense run
        counts the same ones.
    """
    settings, curves = run.settings, run.curves
    tokens = settings.batch * settings.context
    switch = settings.steps if curves.switch_step is None else curves.switch_step
    steady = [(step, seconds) for step, seconds in enumerate(curves.seconds, start=1) if step not in curves.compiling]
    before = _median([seconds for step, seconds in steady if step <= switch])
    after = _median([seconds for step, seconds in steady if step > switch])
    state = slope.training_state(run.model, run.optimizer, paths=list(paths))
    return Result(
        kind=run.kind,
        validation_loss=curves.validation[-1][1],
        tokens_per_second=None if before is None else tokens / before,
        tokens_per_second_adapters=None if after is None else tokens / after,
        compile_seconds=_excess(curves, [step for step in curves.compiling if step <= switch], before),
        recompile_seconds=_excess(curves, [step for step in curves.compiling if step > switch], after),
        linear_bytes=dataclasses.asdict(state.linears),
        adapter_bytes=state.adapters.total,
        model_bytes=state.total,
    )


def table(results: dict[Kind, Result], form: str = "simple") -> str:
    """The figures side by side, with the ratio SLoPe / dense when there are both; ``form`` is tabulate's."""
    kinds = list(results)
    both = len(kinds) == 2
    rows: list[list[str]] = []

    def row(label: str, figure: Callable[[Result], float | None], form: Callable[[float], str]) -> None:
        figures = {kind: figure(results[kind]) for kind in kinds}
        if all(value is None for value in figures.values()):
            return
        cells = [label] + ["-" if value is None else form(value) for value in figures.values()]
        if both:
            dense, sparse = figures["dense"], figures["slope"]
            cells.append(f"{sparse / dense:.3f}" if dense and sparse is not None else "-")
        rows.append(cells)

    def linear(part: str) -> Callable[[Result], float]:
        return lambda result: result.linear_bytes[part]

    row("validation loss (nats per byte)", lambda r: r.validation_loss, "{:.4f}".format)
    row("validation perplexity per byte", lambda r: r.perplexity, "{:.3f}".format)
    row("tokens/s, adapters off (median step)", lambda r: r.tokens_per_second, "{:,.0f}".format)
    if any(result.tokens_per_second_adapters for result in results.values()):
        # The dense run has no adapters: its one speed is what both of SLoPe's are compared with.
        row("tokens/s, adapters on (median step)", _speed_with_adapters, "{:,.0f}".format)
    row("compile time (s)", lambda r: r.compile_seconds, "{:.1f}".format)
    row("recompile at the switch (s)", lambda r: r.recompile_seconds, "{:.1f}".format)
    for part in ("weights", "metadata", "gradients", "moments"):
        row(f"sparse linears: {part}", linear(part), _size)
    row("sparse linears: training state", lambda r: sum(r.linear_bytes.values()), _size)
    row("adapters: training state", lambda r: r.adapter_bytes or None, _size)
    row("whole model: training state", lambda r: r.model_bytes, _size)
    headers = ["measured", *(NAMES[kind] for kind in kinds)] + (["SLoPe/dense"] if both else [])
    align = ("left",) + ("right",) * (len(headers) - 1)
    return tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True, colalign=align)


def plot(curves: dict[Kind, Curves], path: Path) -> None:
    """Draw training losses (smoothed over raw), validation points and the adapter switch into a PNG."""
    # A Figure of its own, without pyplot: no display is looked for and no global state is touched.
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for kind, curve in curves.items():
        color = _COLORS[kind]
        steps = range(1, len(curve.train_loss) + 1)
        axes.plot(steps, curve.train_loss, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smoothed(curve.train_loss), color=color, label=f"{NAMES[kind]}, training (smoothed)")
        if curve.validation:
            points, losses = zip(*curve.validation, strict=True)
            axes.plot(points, losses, "o", color=color, markeredgecolor="black", label=f"{NAMES[kind]}, validation")
        if curve.switch_step is not None:
            axes.axvline(curve.switch_step, color="gray", linestyle="--", label="adapters on")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per byte)", title="Pretraining on the standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def smoothed(losses: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start (as Adam's moments are)."""
    average, averages = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = weight * average + (1 - weight) * loss
        averages.append(average / (1 - weight**step))
    return averages


def write_json(
    path: Path,
    settings: Settings,
    results: dict[Kind, Result],
    curves: dict[Kind, Curves],
    device: torch.device,
    threads: int,
    compiled: bool,
) -> None:
    """Write settings, machine, versions, figures and curves."""
    runs: dict[str, Any] = {
        kind: {
            "result": dataclasses.asdict(results[kind]) | {"perplexity": results[kind].perplexity},
            "curves": dataclasses.asdict(curves[kind]),
        }
        for kind in results
    }
    data = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": _command(settings, threads, compiled),
        "settings": dataclasses.asdict(settings),
        "machine": machine.describe(device) | {"threads": torch.get_num_threads()},
        "runs": runs,
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def read_runs(data: dict[str, Any]) -> dict[Kind, Result]:
    """The figures in what :func:`write_json` has written."""
    names = [field.name for field in dataclasses.fields(Result)]
    kinds: list[Kind] = [kind for kind in NAMES if kind in data["runs"]]
    return {kind: Result(**{name: data["runs"][kind]["result"][name] for name in names}) for kind in kinds}


def _command(settings: Settings, threads: int, compiled: bool) -> str:
    """The command line with these settings; those at their defaults are left out (threads: 0)."""
    words = ["python", "examples/pretrain.py"]
    for field in dataclasses.fields(settings):
        name, value = "--" + field.name.replace("_", "-"), getattr(settings, field.name)
        if value == field.default:
            continue
        words += [name if value else f"--no{name[1:]}"] if isinstance(value, bool) else [name, str(value)]
    if threads:
        words += ["--threads", str(threads)]
    return shlex.join(words if compiled else [*words, "--no-compile"])


def _speed_with_adapters(result: Result) -> float | None:
    return result.tokens_per_second if result.kind == "dense" else result.tokens_per_second_adapters


def _median(seconds: list[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def _excess(curves: Curves, steps: list[int], steady: float | None) -> float | None:
    """Time of the given steps above a steady step's."""
    if not steps or steady is None:
        return None
    return sum(max(0.0, curves.seconds[step - 1] - steady) for step in steps)


def _size(count: float) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
