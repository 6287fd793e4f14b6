"""Hugging Face's ``Trainer``: both ways in give what a loop by hand gives, and its checkpoints bring a run back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slope_compile as slope
import tiny_transformers
from masked import masks_of
from recording import fresh_dynamo as fresh_dynamo
from recording import record
from slope_compile.kernels import ops
from slope_compile.schedule import adapters_of
from tiny_transformers import VOCABULARY
from tolerances import assert_same

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
safetensors_torch = pytest.importorskip("safetensors.torch")

STEPS = 6
SPARSE = {"gpt2": 3, "llama": 4}
"""Products that the method makes sparse in one block."""


def gpt2() -> nn.Module:
    return tiny_transformers.gpt2(layers=1)


def llama() -> nn.Module:
    return tiny_transformers.llama(layers=1)


TrainerCallback: Any = transformers.TrainerCallback


class Adapters(TrainerCallback):  # type: ignore[misc]
    """As in the README, with adapters for the second half of the steps."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = {"fraction": 0.5, **arguments}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.schedule = slope.AdapterSchedule(model, total_steps=state.max_steps, optimizer=optimizer, **self.arguments)
        taken = {"step_count": state.global_step}
        self.schedule.load_state_dict(self.schedule.state_dict() | taken)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.schedule.step()


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens.  The first is no label, so that it does not matter whether a release counts it as one."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, VOCABULARY, (48, 9), generator=torch.Generator().manual_seed(0))
        self.labels = self.ids.clone()
        self.labels[:, 0] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Collator:
    """Stacks examples, and remembers every batch."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append({name: torch.stack([example[name] for example in examples]) for name in examples[0]})
        return self.batches[-1]


def prepared(make: Callable[[], nn.Module], **fields: Any) -> nn.Module:
    model = make()
    slope.sparsify_(model, slope.SlopeConfig(adapter_rank=4, **fields))
    return model


def compile_(model: nn.Module, **options: Any) -> nn.Module:
    """In place, as the README says.  Rewritten graphs run as they are: what compiles them is not of interest here."""
    model.compile(backend="slope", options={"compiler": "eager", **options})
    return model


def trainer(model: nn.Module, folder: Path, callbacks: Iterable[Any] = (), **arguments: Any) -> Any:
    """A Trainer of some steps with weight decay; ``eps`` as coarse as in ``test_training.adamw_coarse``."""
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1,
        "adam_epsilon": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, **arguments,
    }  # fmt: skip
    data = Examples()
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data,
        eval_dataset=torch.utils.data.Subset(data, range(8)),
        data_collator=Collator(),
        callbacks=list(callbacks),
    )


def logged(trained: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def by_hand(
    model: nn.Module, batches: list[dict[str, Tensor]], micro: int, schedule: slope.AdapterSchedule | None
) -> list[float]:
    """The stock loop with the same settings; losses of its steps.  Matrices decay, and nothing else."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.dim() == 2].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
        lr=1e-2, eps=1e-3,
    )  # fmt: skip
    losses = []
    for first in range(0, STEPS * micro, micro):
        step = batches[first : first + micro]
        count = sum((batch["labels"] != -100).sum() for batch in step)
        parts = [model(**batch, num_items_in_batch=count).loss for batch in step]
        torch.stack(parts).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(sum(float(part.detach()) for part in parts))
    return losses


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert_same(tensor, theirs[name], name)
        else:
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(("make", "compiled"), [(gpt2, False), (llama, True)])
def test_prepared_equals_a_loop_by_hand(make: Callable[[], nn.Module], compiled: bool, tmp_path: Path) -> None:
    """With accumulation, clipping, decay, column masks picked every two steps, and adapters for the second half."""
    model = prepared(make, column_refresh=2)
    twin = copy.deepcopy(model)
    if compiled:
        compile_(model)
        compile_(twin)
    trained = trainer(model, tmp_path, [Adapters()], gradient_accumulation_steps=2, max_grad_norm=0.5)
    trained.train()
    schedule = slope.AdapterSchedule(twin, total_steps=STEPS, fraction=0.5)
    losses = by_hand(twin, trained.data_collator.batches, 2, schedule)
    assert_same(torch.tensor(logged(trained)), torch.tensor(losses))
    assert_same_state(model, twin)
    assert len(masks_of(model)) == SPARSE[make.__name__]
    assert all(adapter.enabled and adapter.B.any() for adapter in adapters_of(model))


@pytest.mark.slow
def test_drop_in_equals_a_loop_by_hand(tmp_path: Path) -> None:
    """The same model, prepared: both choose the same masks, and eager execution has the exact input gradient."""
    model = llama()
    twin = copy.deepcopy(model)
    slope.sparsify_(twin)
    compile_(model, backward="exact")
    trained = trainer(model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5)
    trained.train()
    losses = by_hand(twin, trained.data_collator.batches, 2, None)
    assert_same(torch.tensor(logged(trained)), torch.tensor(losses))
    dense = copy.deepcopy(twin)  # without the optimizer's state
    slope.densify_(dense)
    assert_same_state(model, dense)
    masks = masks_of(model)
    assert len(masks) == SPARSE["llama"]
    assert not any(model.get_parameter(f"{path}.weight")[~mask].any() for path, mask in masks.items())


@pytest.mark.slow
def test_autocast_and_recomputed_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products are sparse, in evaluation too, and losses are those without either, up to bfloat16."""
    recording = record(monkeypatch)
    plain = prepared(llama, backward="exact")
    model = compile_(copy.deepcopy(plain))
    trained = trainer(model, tmp_path, bf16=True, gradient_checkpointing=True)
    expected = trainer(plain, tmp_path)
    for one in (trained, expected):
        one.train()
        one.evaluate()
    for name in ("loss", "eval_loss"):
        ours, theirs = logged(trained, name), logged(expected, name)
        assert ours == pytest.approx(theirs, rel=2.0**-8)  # one rounding of the logits
        assert ours != theirs, "autocast was on"
    assert [graph.sparse for graph in recording if graph.sparse] == [SPARSE["llama"]] * 2
    assert not any(graph.after[ops.expand] for graph in recording)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "way", "steps"),
    [
        pytest.param(llama, "A", [1], id="llama-A"),
        pytest.param(llama, "B compiled", [3], id="llama-B-compiled"),
        pytest.param(gpt2, "B", [1, 4], id="gpt2-B"),
    ],
)
def test_resume(make: Callable[[], nn.Module], way: str, steps: list[int], tmp_path: Path) -> None:
    """From before the adapters come on and after, in a model with other weights and masks: bitwise the same run."""

    def run(folder: Path, checkpoint: Path | None = None, **arguments: Any) -> tuple[Any, nn.Module]:
        model = make() if way == "A" else prepared(make, column_refresh=2, seed=int(checkpoint is not None))
        if way != "B":
            compile_(model, **({"backward": "exact"} if way == "A" else {}))  # in way A no checkpoint has column masks
        one = trainer(model, folder, [] if way == "A" else [Adapters()], **arguments)
        one.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return one, model

    whole, model = run(tmp_path / "whole", save_strategy="steps", save_steps=1)
    for taken in steps:
        resumed, other = run(tmp_path / f"from_{taken}", tmp_path / "whole" / f"checkpoint-{taken}")
        assert logged(resumed) == logged(whole)
        theirs = model.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in other.state_dict().items())


def test_best_model(tmp_path: Path) -> None:
    """It comes back with the adapters as they were at that step: off."""
    model = prepared(llama)
    trained = trainer(
        model, tmp_path, [Adapters()], save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_step", greater_is_better=False,
    )  # fmt: skip
    trained.compute_metrics = lambda _: {"step": trained.state.global_step}
    trained.train()
    assert trained.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    saved = safetensors_torch.load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert not any(adapter.enabled for adapter in adapters_of(model))
    assert trained.evaluate()["eval_loss"] == logged(trained, "eval_loss")[0]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_saved_for_others(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Compressed for a model that is prepared likewise, dense for plain transformers."""
    model = prepared(make)
    trained = trainer(model, tmp_path, [Adapters()])
    trained.train()
    ids = torch.randint(3, VOCABULARY, (2, 9))
    logits = model.eval()(ids).logits

    trained.save_model(str(tmp_path / "compressed"))
    other = prepared(make, seed=1)
    safetensors_torch.load_model(other, tmp_path / "compressed" / "model.safetensors")
    assert torch.equal(other.eval()(ids).logits, logits)

    with pytest.raises(slope.ConversionError, match=r"copy\.deepcopy\(model\)"):  # the Trainer holds its optimizer
        slope.densify_(model)
    dense = copy.deepcopy(model)
    slope.densify_(dense)
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    plain = type(dense).from_pretrained(tmp_path / "dense")  # type: ignore[attr-defined]
    assert_same(plain.eval()(ids).logits, logits)


def test_learning_rate_of_the_adapters(tmp_path: Path) -> None:
    """The optimizer that a callback sees is accelerate's wrapper, which has no hooks: the inner one has."""
    start, factors = prepared(gpt2), {}
    for scale in (1.0, 3.0):
        model = copy.deepcopy(start)
        adapters = Adapters(fraction=1 / STEPS, lr_scale=scale)
        trainer(model, tmp_path, [adapters], optim="sgd").train()
        factors[scale] = [adapter.B.detach() for adapter in adapters_of(model)]
    for once, thrice in zip(factors[1.0], factors[3.0], strict=True):
        assert once.any()
        assert_same(thrice, 3 * once)  # from zero, in the one step with adapters


def test_the_name_of_the_backend_is_not_for_the_arguments(tmp_path: Path) -> None:
    """accelerate has a list of backends: what the README says of ``torch_compile_backend``, for as long as it is so."""
    with pytest.raises(ValueError, match="SLOPE"):
        trainer(gpt2(), tmp_path, torch_compile=True, torch_compile_backend="slope")
