"""The main example at a tiny size: what it writes, that it learns, and that stopping and resuming change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # As `python examples/pretrain.py` does.

import pretrain  # noqa: E402
import stdlib_text  # noqa: E402
from training import Run, Settings  # noqa: E402

STEPS = 12
SWITCH = 8
"""With the fraction below, the adapters are off for the first 8 of the 12 steps."""
TINY = [
    *("--layers", "2", "--width", "48", "--heads", "2", "--context", "32", "--batch", "4"),
    *("--steps", str(STEPS), "--lr", "0.01", "--adapter-rank", "4", "--adapter-fraction", "0.33"),
    *("--validate-every", "4", "--validation-batches", "2", "--save-every", "5"),
    # Tiny operations on several threads of a busy machine wait for each other most of the time.
    *("--device", "cpu", "--threads", "1"),
]
KINDS = ("dense", "slope")


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """``--threads`` sets the whole process; the other tests get their number back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def corpus() -> Iterator[stdlib_text.Corpus]:
    """Read once for all jobs, most of whose time reading would be."""
    read, found = stdlib_text.load, stdlib_text.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_text, "load", lambda *folder: read(*folder) if folder else found)
        yield found


@pytest.fixture(scope="module")
def uninterrupted(corpus: stdlib_text.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a job that ran to its end, eagerly."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert pretrain.main([*TINY, "--no-compile", "--out", str(out)]) == 0
    return out


def curves(out: Path) -> dict[str, Any]:
    """Curves by kind of run, without the times."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    return {kind: {k: v for k, v in run["curves"].items() if k != "seconds"} for kind, run in runs.items()}


def assert_same_losses(out: Path, expected: Path) -> None:
    """The two jobs' training and validation losses agree to rounding, and the adapters came on at the same step."""
    actual, wanted = curves(out), curves(expected)
    assert actual.keys() == wanted.keys()
    for kind in wanted:
        torch.testing.assert_close(actual[kind]["train_loss"], wanted[kind]["train_loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(actual[kind]["validation"], wanted[kind]["validation"], rtol=1e-6, atol=0)
        assert actual[kind]["switch_step"] == wanted[kind]["switch_step"]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, kind: str, step: int, times: int = 1) -> None:
    """Have Ctrl-C pressed in the middle of a step: after its loss is computed, before the optimizer's step."""
    forward = Run.train_step

    def train_step(self: Run, corpus: stdlib_text.Corpus) -> float:
        if self.kind == kind and self.step + 1 == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return forward(self, corpus)

    monkeypatch.setattr(Run, "train_step", train_step)


def test_no_file_is_in_both_texts(corpus: stdlib_text.Corpus) -> None:
    train, validation = set(corpus.train_files), set(corpus.validation_files)
    assert not train & validation
    assert len(train) == len(corpus.train_files)
    assert 0.01 < len(validation) / len(train) < 0.1
    assert len(corpus.train) > 1_000_000
    assert len(corpus.validation) > 50_000
    assert not {"site-packages", "test", "tests"} & {part for path in train | validation for part in Path(path).parts}


def test_equal_files_are_read_once(tmp_path: Path) -> None:
    # A copy of a training file must not turn up in the validation text.
    names = [f"module_{index}.py" for index in range(200)]
    for name in names:
        (tmp_path / name).write_text("value = 1\n" if name != names[-1] else "value = 2\n")
    sides = {stdlib_text.is_validation(name) for name in names}
    assert sides == {True, False}
    (tmp_path / next(n for n in names if stdlib_text.is_validation(n))).write_text("value = 3\n")
    corpus = stdlib_text.load(tmp_path)
    assert len(corpus.train_files) + len(corpus.validation_files) == 3


def test_a_folder_without_enough_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few Python files"):
        stdlib_text.load(tmp_path)


def test_a_batch_depends_on_seed_and_step_alone(corpus: stdlib_text.Corpus) -> None:
    def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return stdlib_text.batch(corpus.train, seed=seed, step=step, batch=3, context=16)

    tokens, targets = batch(0, 5)
    assert tokens.shape == targets.shape == (3, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, batch(0, 5)[0])
    assert not torch.equal(tokens, batch(0, 6)[0])
    assert not torch.equal(tokens, batch(1, 5)[0])


def test_validation_windows_reach_from_start_to_end(corpus: stdlib_text.Corpus) -> None:
    batches = stdlib_text.validation_batches(corpus.validation, count=3, batch=2, context=16)
    assert [tuple(tokens.shape) for tokens, _ in batches] == [(2, 16)] * 3
    assert torch.equal(batches[0][0][0], corpus.validation[:16].long())
    assert torch.equal(batches[-1][1][-1], corpus.validation[-16:].long())


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_learning_rate_rises_then_falls(decay: Any) -> None:
    settings = Settings(steps=100, warmup=0.1, final_lr=0.05, decay=decay)
    factors = [settings.lr_factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.05)


def test_both_runs_learn_and_leave_their_results(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((uninterrupted / "results.json").read_text())
    for kind in KINDS:
        losses = data["runs"][kind]["curves"]["train_loss"]
        assert len(losses) == STEPS
        assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
        assert [step for step, _ in data["runs"][kind]["curves"]["validation"]] == [4, 8, 12]
    assert data["runs"]["dense"]["curves"]["switch_step"] is None
    assert data["runs"]["slope"]["curves"]["switch_step"] == SWITCH
    assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")
    # A finished job can be asked for its table again.
    out, checkpoint = str(uninterrupted), str(uninterrupted / "checkpoint.pt")
    assert pretrain.main(["--resume", checkpoint, "--out", out, "--no-compile"]) == 0
    printed = capsys.readouterr().out
    for line in ("validation loss", "perplexity", "tokens/s", "training state", "SLoPe/dense", "whole model"):
        assert line in printed


def test_training_state_of_the_sparse_linears_is_about_half(uninterrupted: Path) -> None:
    runs = json.loads((uninterrupted / "results.json").read_text())["runs"]
    dense, sparse = (runs[kind]["result"]["linear_bytes"] for kind in KINDS)
    # In parts of 48 x 48 float32: out, up and down of both blocks, qkv of the second one only.
    assert dense["weights"] == (2 * (1 + 4 + 4) + 3) * 48 * 48 * 4
    for part in ("weights", "gradients", "moments"):
        assert sparse[part] == pytest.approx(dense[part] / 2, rel=0.05)
    assert sum(sparse.values()) <= 0.53 * sum(dense.values())
    assert runs["dense"]["result"]["adapter_bytes"] == 0
    assert runs["slope"]["result"]["adapter_bytes"] > 0


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        pytest.param("dense", 3, id="dense"),
        pytest.param("slope", 1, id="slope, first step"),
        pytest.param("slope", 5, id="before the switch"),
        pytest.param("slope", SWITCH, id="at the switch"),
        pytest.param("slope", 10, id="after the switch"),
    ],
)
def test_an_interrupted_job_goes_on_as_if_nothing_had_happened(
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    step: int,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, kind, step)
        assert pretrain.main([*TINY, "--no-compile", "--out", str(tmp_path)]) == 130
    checkpoint = tmp_path / "checkpoint.pt"
    resume = capsys.readouterr().out.splitlines()[-1].split()
    assert resume[0] == sys.orig_argv[0]
    assert resume[2:4] == ["--resume", str(checkpoint)]
    assert {"--no-compile", "--out", "--threads"} <= set(resume)
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["runs"][kind]["step"] == step
    assert pretrain.main(resume[2:]) == 0
    assert_same_losses(tmp_path, uninterrupted)


def test_a_second_interrupt_stops_at_once_and_leaves_the_last_checkpoint(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, "slope", 9, times=2)
        assert pretrain.main([*TINY, "--no-compile", "--out", str(tmp_path)]) == 130
    checkpoint = tmp_path / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["runs"]["slope"]["step"] == 5
    assert pretrain.main(["--resume", str(checkpoint), "--no-compile", "--out", str(tmp_path)]) == 0
    assert_same_losses(tmp_path, uninterrupted)


def test_a_compiler_killed_by_the_interrupt_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_step(self: Run, corpus: stdlib_text.Corpus) -> float:
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("the compiler was killed")

    monkeypatch.setattr(Run, "train_step", train_step)
    assert pretrain.main([*TINY, "--no-compile", "--run", "dense", "--out", str(tmp_path)]) == 130
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["runs"]["dense"]["step"] == 0


def test_a_missing_compiler_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text that is looked for is that of the installed torch."""

    def train_step(self: Run, corpus: stdlib_text.Corpus) -> float:
        raise RuntimeError("backend failed") from InvalidCxxCompiler()

    monkeypatch.setattr(Run, "train_step", train_step)
    with pytest.raises(RuntimeError, match="backend failed"):
        pretrain.main([*TINY, "--run", "dense", "--out", str(tmp_path)])

    def wrapped(self: Run, corpus: stdlib_text.Corpus) -> float:
        raise RuntimeError(f"InvalidCxxCompiler: {InvalidCxxCompiler()}")

    monkeypatch.setattr(Run, "train_step", wrapped)
    assert pretrain.main([*TINY, "--run", "dense", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "No working C++ compiler" in said
    assert "--no-compile" in said


def test_one_run_can_be_added_to_another(uninterrupted: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--no-compile"]
    assert pretrain.main([*TINY, *out, "--run", "dense"]) == 0
    assert curves(tmp_path).keys() == {"dense"}
    assert pretrain.main(["--resume", str(tmp_path / "checkpoint.pt"), *out, "--run", "slope"]) == 0
    assert_same_losses(tmp_path, uninterrupted)


def test_the_checkpoint_goes_where_save_says(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the results, in a folder made for it; the command to go on names it, and goes on writing it."""
    out, kept = tmp_path / "out", tmp_path / "new" / "kept.pt"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "slope", 5)
        assert pretrain.main([*TINY, "--no-compile", "--out", str(out), "--save", str(kept)]) == 130
    assert torch.load(kept, weights_only=True)["runs"]["slope"]["step"] == 5
    assert not (out / "checkpoint.pt").exists()
    resume = capsys.readouterr().out.splitlines()[-1].split()
    assert resume[2:4] == ["--resume", str(kept)]
    before = kept.read_bytes()
    # Another name leaves the file that was resumed from as it is.
    assert pretrain.main([*resume[2:], "--save", str(tmp_path / "end.pt")]) == 0
    assert kept.read_bytes() == before
    assert f"{tmp_path / 'end.pt'}" in capsys.readouterr().out
    assert_same_losses(out, uninterrupted)
    assert pretrain.main(resume[2:]) == 0
    for path in (kept, tmp_path / "end.pt"):
        assert torch.load(path, weights_only=True)["results"].keys() == set(KINDS)
    assert {path.name for path in kept.parent.iterdir()} == {kept.name}, "nothing half written is left"
    assert not (out / "checkpoint.pt").exists()


def test_what_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("empty", b""), ("text", b"validation loss 2.5\n"), ("cut", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
    torch.save({"model": {}}, tmp_path / "foreign")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(SystemExit, match="2"):
            pretrain.main(["--resume", str(path)])
        assert f"{path} is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--heads", "5"], "heads: 5 heads do not divide width", id="heads"),
        pytest.param(["--steps", "0"], "steps: expected 1 or more, got 0", id="steps"),
        pytest.param(["--lr", "-1"], "lr: expected a positive number", id="lr"),
        pytest.param(["--save-every", "0"], "save_every: expected 1 or more", id="save-every"),
        pytest.param(["--save", str(EXAMPLES)], f"{EXAMPLES} is a folder", id="save"),
        pytest.param(["--pattern", "5:4"], "pattern", id="pattern"),
        pytest.param(["--resume", "no/such/file"], "no/such/file", id="no checkpoint"),
    ],
)
def test_an_unusable_flag_is_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(flags)
    assert message in capsys.readouterr().err


def test_a_resumed_job_keeps_its_settings(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--resume", str(uninterrupted / "checkpoint.pt"), "--steps", "99"])
    assert f"--steps 99 differs from the checkpoint's {STEPS}" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="try a smaller --lr"):
        pretrain.main([*TINY, "--no-compile", "--run", "dense", "--lr", "1e30", "--out", str(tmp_path)])


def test_bfloat16_and_a_tied_head(tmp_path: Path) -> None:
    flags = [*TINY, "--no-compile", "--dtype", "bfloat16", "--tied", "--steps", "6", "--out", str(tmp_path)]
    assert pretrain.main(flags) == 0
    for curve in curves(tmp_path).values():
        assert curve["train_loss"][-1] < curve["train_loss"][0]


@pytest.mark.slow
def test_compiled_from_the_shell_with_a_real_interrupt(tmp_path: Path) -> None:
    """The command as a user types it: compiled, stopped by SIGINT, resumed as it says."""
    # One block: compiling is what takes the time here.
    smaller, out = [*TINY, "--layers", "1"], tmp_path / "compiled"
    command = [sys.executable, str(EXAMPLES / "pretrain.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(
        [*command, *smaller, "--out", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert first.stdout is not None
    output = ""
    # Between the validations after steps 4 and 8 of the SLoPe run: everything is compiled, the switch is to come.
    for line in first.stdout:
        output += line
        if "SLoPe: step 4" in line:
            first.send_signal(signal.SIGINT)
            break
    output += first.stdout.read()
    assert first.wait(timeout=600) == 130, output
    resume = output.strip().splitlines()[-1].split()
    assert resume[2] == "--resume", output
    second = subprocess.run(
        [*command, *resume[2:]], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert "SLoPe/dense" in second.stdout
    assert "adapters on after step 8" in second.stderr + second.stdout
    assert pretrain.main([*smaller, "--no-compile", "--out", str(tmp_path / "eager")]) == 0
    compiled, eager = curves(out), curves(tmp_path / "eager")
    torch.testing.assert_close(compiled["dense"]["train_loss"], eager["dense"]["train_loss"], rtol=1e-3, atol=0)
    # Double pruning leaves the first loss as it is, and changes what follows a little.
    assert compiled["slope"]["train_loss"][0] == pytest.approx(eager["slope"]["train_loss"][0], rel=1e-5)
    assert compiled["slope"]["train_loss"][-1] < 0.85 * compiled["slope"]["train_loss"][0]
