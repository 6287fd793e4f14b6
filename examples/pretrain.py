"""Pretrain a small GPT on real text twice, dense and with SLoPe, and compare: the library's main example.

    python examples/pretrain.py    # both runs, a table, runs/pretrain/{loss.png,results.json}
    python examples/pretrain.py --run slope --steps 1000 --dtype bfloat16
    python examples/pretrain.py --resume runs/pretrain/checkpoint.pt

Both runs see the same batches and start from the same weights.  The dense one is ``torch.compile(model)``;
the SLoPe one is ``sparsify_(model, config)``, the stock optimizer, ``torch.compile(model, backend="slope")``
and an ``AdapterSchedule`` that switches the low-rank adapters on near the end: see ``training.py``.

Ctrl-C ends the job after the step in progress and leaves a checkpoint from which ``--resume`` continues
with the losses that the uninterrupted job would have had.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import shlex
import signal
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm

import pretrain_results as results
import stdlib_text
from pretrain_results import Result
from training import Curves, Kind, Run, Settings, flag

_KINDS: tuple[Kind, ...] = ("dense", "slope")
_Flags = TypeVar("_Flags", Settings, "Place")
_INTERRUPTED = 130
"""Exit status of a program ended by Ctrl-C, by the shell's convention."""
_NO_COMPILER = """\
No working C++ compiler was found, and torch.compile needs one on a CPU.  Install g++ or clang (Debian, Ubuntu: apt
install g++), name another with the environment variable CXX, or run eagerly with --no-compile: the same losses but for
SLoPe's input gradient, which is the exact one then, and more time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how to run: flags that do not change what is computed, free to differ on resuming."""

    run: Literal["dense", "slope", "both"] = flag("both", "which runs: dense, slope or both")
    device: str = flag("", "device; default: cuda where there is one, else cpu")
    threads: int = flag(0, "CPU threads; 0 = PyTorch's default")
    compile: bool = flag(
        True,
        "compile the models; without it, both run eagerly and SLoPe's input gradient is the exact one",
    )
    out: str = flag("runs/pretrain", "folder for the results")
    save: str = flag("", "checkpoint file; default: checkpoint.pt in --out")
    save_every: int = flag(
        100,
        "steps between two checkpoints; one is also written at a run's end and on Ctrl-C",
    )

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ValueError(f"save_every: expected 1 or more, got {self.save_every}")
        if self.checkpoint.is_dir():
            raise ValueError(f"save: expected a file for the checkpoint, and {self.checkpoint} is a folder")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The runs asked for, in order."""
        return tuple(kind for kind in _KINDS if self.run in (kind, "both"))

    @property
    def checkpoint(self) -> Path:
        """The file that checkpoints go to."""
        return Path(self.save) if self.save else Path(self.out) / "checkpoint.pt"


class Interrupt:
    """Turns the first Ctrl-C into a request, so that no step is left half done; the second ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, _signal: int, _frame: types.FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("Interrupted: finishing this step; once more to stop at once.", file=sys.stderr)


class Job:
    """The runs of one command and their checkpoint file."""

    def __init__(self, settings: Settings, place: Place, saved: dict[str, Any] | None) -> None:
        self.settings = settings
        self.place = place
        self.corpus = stdlib_text.load()
        self.validation = stdlib_text.validation_batches(
            self.corpus.validation,
            count=settings.validation_batches,
            batch=settings.batch,
            context=settings.context,
        )
        self.states: dict[Kind, dict[str, Any]] = dict(saved["runs"]) if saved else {}
        self.results: dict[Kind, Result] = (
            {kind: Result(**fields) for kind, fields in saved["results"].items()} if saved else {}
        )
        self.device = torch.device(place.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def execute(self, interrupt: Interrupt) -> bool:
        """Take every run to its end; return False when interrupted.  Finished runs are not repeated."""
        paths = self._sparse_paths()
        for kind in self.place.kinds:
            if kind in self.results:
                continue
            # Each run pays for its own compilation, and leaves none of its graphs to the next.
            torch.compiler.reset()
            run = Run(kind, self.settings, device=self.device, compiled=self.place.compile)
            if run.report is not None:
                print(run.report)
            if kind in self.states:
                run.load_state_dict(self.states[kind])
            # From here on there is always a file to resume from, whatever ends the process.
            self._save(run)
            try:
                self._train(run, interrupt)
            except Exception:
                # A terminal sends Ctrl-C to the compilers that PyTorch has started too; their failure is then
                # not news.  Compiling happens before a step changes anything, so the run is whole.
                if not interrupt.requested:
                    raise
            self._save(run)
            if not run.finished:
                return False
            self.results[kind] = results.measure(run, paths)
            self._save(run)
        return True

    def report(self) -> None:
        """Print the table; write the picture and the JSON."""
        out = Path(self.place.out)
        out.mkdir(parents=True, exist_ok=True)
        done = {kind: self.results[kind] for kind in _KINDS if kind in self.results}
        curves = {kind: Curves.from_dict(self.states[kind]["curves"]) for kind in done}
        print(results.table(done))
        results.plot(curves, out / "loss.png")
        place = self.place
        results.write_json(out / "results.json", self.settings, done, curves, self.device, place.threads, place.compile)
        print(f"Written: {out / 'loss.png'}, {out / 'results.json'}, {self.place.checkpoint}")

    def _train(self, run: Run, interrupt: Interrupt) -> None:
        settings = self.settings
        label = results.NAMES[run.kind]
        with tqdm(total=settings.steps, initial=run.step, desc=label, unit="step", dynamic_ncols=True) as bar:
            while not run.finished and not interrupt.requested:
                if run.will_compile:
                    bar.set_postfix_str("compiling")
                loss = run.train_step(self.corpus)
                speed = settings.batch * settings.context / run.curves.seconds[-1]
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()
                if run.curves.switch_step == run.step:
                    tqdm.write(f"{label}: adapters on after step {run.step}")
                if run.step % settings.validate_every == 0 or run.finished:
                    tqdm.write(f"{label}: step {run.step}, validation loss {run.validate(self.validation):.4f}")
                if run.step % self.place.save_every == 0:
                    self._save(run)

    def _save(self, run: Run) -> None:
        """Write the checkpoint; a process that dies meanwhile leaves the previous one."""
        self.states[run.kind] = run.state_dict()
        path = self.place.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        data = {
            "settings": dataclasses.asdict(self.settings),
            "runs": self.states,
            "results": {kind: dataclasses.asdict(result) for kind, result in self.results.items()},
        }
        torch.save(data, partial)
        os.replace(partial, path)

    def _sparse_paths(self) -> list[str]:
        """Module paths of the linears that SLoPe makes sparse; the dense run's table counts the same ones."""
        report = Run("slope", self.settings, device=torch.device("cpu"), compiled=False).report
        assert report is not None
        return [decision.weight for decision in report.sparse]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume", None)
    saved = None
    try:
        place = _from_flags(Place, given)
        settings = _from_flags(Settings, given)
        settings.gpt_config()  # Checks the sizes.
        settings.slope_config()
        if resume is not None:
            saved = _load_checkpoint(resume)
            settings = _resumed_settings(saved["settings"], given)
            if "save" not in given:
                place = dataclasses.replace(place, save=str(resume))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if place.threads:
        torch.set_num_threads(place.threads)
    with Interrupt() as interrupt:
        job = Job(settings, place, saved)
        try:
            finished = job.execute(interrupt)
        except KeyboardInterrupt:
            finished = False
        except Exception as error:
            if not _lacks_compiler(error):
                raise
            print(_NO_COMPILER, file=sys.stderr)
            return 1
    if not finished:
        again = ["--resume", str(place.checkpoint), *_place_flags(place)]
        # The interpreter as it was called: started by make, it is not the one that `python` finds.
        print(f"Stopped. To go on:\n  {shlex.join([sys.orig_argv[0], sys.argv[0], *again])}")
        return _INTERRUPTED
    job.report()
    return 0


def _lacks_compiler(error: BaseException) -> bool:
    """Whether Inductor found no compiler for its code; Dynamo wraps that error, and keeps its text."""
    return "No working C++ compiler found" in str(error)


def _parser() -> argparse.ArgumentParser:
    """One flag for each field of Settings and Place; a flag that is not given is absent from the result."""
    parser = argparse.ArgumentParser(
        description="Pretrain a small GPT on Python's standard library, dense and with SLoPe, and compare.",
        argument_default=argparse.SUPPRESS,
    )
    for group in (Settings, Place):
        hints = typing.get_type_hints(group)
        flags = parser.add_argument_group("what is computed" if group is Settings else "where and how")
        for field in dataclasses.fields(group):
            name, hint = _flag_name(field.name), hints[field.name]
            help_text = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
            if hint is bool:
                flags.add_argument(name, action=argparse.BooleanOptionalAction, help=help_text)
            elif typing.get_origin(hint) is typing.Literal:
                flags.add_argument(name, choices=typing.get_args(hint), help=help_text)
            else:
                flags.add_argument(name, type=hint, help=help_text)
    flags.add_argument("--resume", metavar="PATH", type=Path, help="checkpoint to go on from")
    return parser


def _flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def _from_flags(group: type[_Flags], given: dict[str, Any]) -> _Flags:
    """The dataclass with the flags that were given, defaults elsewhere."""
    names = {field.name for field in dataclasses.fields(group)}
    return group(**{name: value for name, value in given.items() if name in names})


def _load_checkpoint(path: Path) -> dict[str, Any]:
    """What :class:`Job` saved.

    Raises:
        ValueError: the file is something else.
        OSError: there is no such file.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, LookupError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"resume: {path} is no checkpoint") from error
    if not isinstance(saved, dict) or not {"settings", "runs", "results"} <= saved.keys():
        raise ValueError(f"resume: {path} is no checkpoint of this program")
    return saved


def _resumed_settings(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """The checkpoint's settings.

    Raises:
        ValueError: a flag that was given says otherwise, or this version does not know a setting.
    """
    unknown = set(saved) - {field.name for field in dataclasses.fields(Settings)}
    if unknown:
        raise ValueError(f"the checkpoint has settings that this version does not know: {sorted(unknown)}")
    for name, value in saved.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{_flag_name(name)} {given[name]} differs from the checkpoint's {value}, and a resumed run "
                "cannot change it; leave the flag out, or start a new run"
            )
    return Settings(**saved)


def _place_flags(place: Place) -> list[str]:
    """The flags that say what ``place`` says, without defaults and without --save (a resumed run's own)."""
    words = []
    for field in dataclasses.fields(place):
        value = getattr(place, field.name)
        if field.name == "save" or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(_flag_name(field.name if value else f"no_{field.name}"))
        else:
            words += [_flag_name(field.name), str(value)]
    return words


if __name__ == "__main__":
    sys.exit(main())
