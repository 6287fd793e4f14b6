"""One training run, dense or SLoPe: what it is made of, one step of it, and its state.

The two kinds differ in three places only, all in :class:`Run`: ``sparsify_`` before the optimizer is made,
the backend's name, and the adapter schedule's step.  The rest is the stock loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Any, Literal

import torch
from torch import Tensor

import slope_compile as slope
import stdlib_text
from gpt import GPT, GPTConfig

Kind = Literal["dense", "slope"]


def flag(default: Any, text: str) -> Any:
    """A dataclass field that is also a flag of the command line, with the text of its ``--help``."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides the losses; a checkpoint holds it.  Each field is a flag of the command line."""

    layers: int = flag(4, "blocks")
    width: int = flag(384, "width of the residual stream")
    heads: int = flag(4, "attention heads")
    context: int = flag(128, "bytes a sequence")
    tied: bool = flag(False, "share the head's weight with the token embedding")
    batch: int = flag(8, "sequences a step")
    steps: int = flag(120, "optimizer steps")
    seed: int = flag(0, "seed of the initial weights, the batches and the sparse masks")
    lr: float = flag(2e-3, "peak learning rate")
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises")
    decay: Literal["cosine", "linear"] = flag("cosine", "how the learning rate falls after warm-up")
    final_lr: float = flag(0.05, "learning rate at the end, as a share of the peak")
    weight_decay: float = flag(0.1, "AdamW's decoupled decay of matrices (not of biases and norms)")
    clip: float = flag(1.0, "largest norm of the whole gradient")
    dtype: Literal["float32", "bfloat16"] = flag(
        "float32",
        "compute type; bfloat16 through autocast, with float32 weights",
    )
    adapter_rank: int = flag(8, "rank of the lazy low-rank adapters; 0 = none")
    adapter_fraction: float = flag(
        0.1,
        "share of the steps, at the end, in which the adapters are on; the method's value for long "
        "runs is 0.01, which in a run this short would be too few steps to see",
    )
    pattern: str = flag("2:4", "kept:group along in_features")
    mask: Literal["random", "magnitude"] = flag("random", "how the static forward mask is chosen")
    backward: Literal["double_pruned", "exact"] = flag(
        "double_pruned",
        "input gradient of the compiled SLoPe run",
    )
    validate_every: int = flag(50, "steps between two validations; the last step is always validated")
    validation_batches: int = flag(16, "batches in a validation")

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "validate_every", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 < self.adapter_fraction <= 1:
            raise ValueError(f"adapter_fraction: expected above 0, up to 1, got {self.adapter_fraction}")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")

    def gpt_config(self) -> GPTConfig:
        """The size of the model."""
        return GPTConfig(
            vocabulary=stdlib_text.VOCABULARY,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            context=self.context,
            tied=self.tied,
        )

    def slope_config(self) -> slope.SlopeConfig:
        """What ``sparsify_`` is asked to do."""
        return slope.SlopeConfig(
            pattern=self.pattern,
            mask=self.mask,
            seed=self.seed,
            backward=self.backward,
            adapter_rank=self.adapter_rank,
        )

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step as a share of the peak: linear warm-up, then cosine or linear decay."""
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.steps - 1 - warmup))
        remaining = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_lr + (1 - self.final_lr) * remaining


@dataclasses.dataclass
class Curves:
    """What a run leaves behind.  Steps count from 1: a value belongs to so many optimizer steps taken."""

    train_loss: list[float] = dataclasses.field(default_factory=list)
    """Of each step, in nats per byte."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Wall-clock time of each step."""
    compiling: list[int] = dataclasses.field(default_factory=list)
    """Steps that had something to compile: the first one of a process, and the first with adapters."""
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """``(step, loss)``."""
    switch_step: int | None = None
    """The last step without adapters."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Curves:
        """Inverse of ``dataclasses.asdict``."""
        points = [(int(step), float(loss)) for step, loss in data["validation"]]
        return cls(**data | {"validation": points})


class Run:
    """Model, optimizer and schedules of one training run, at some step."""

    def __init__(self, kind: Kind, settings: Settings, *, device: torch.device, compiled: bool) -> None:
        self.kind = kind
        self.settings = settings
        self.device = device
        # The same seed gives both kinds the same initial weights; sparsify_ then drops half of some of them.
        torch.manual_seed(settings.seed)
        self.model = GPT(settings.gpt_config()).to(device)
        self.report: slope.Report | None = None
        if kind == "slope":
            self.report = slope.sparsify_(self.model, settings.slope_config())
        self.optimizer = _optimizer(self.model, settings)
        self.lr_schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.lr_factor)
        self.adapters: slope.AdapterSchedule | None = None
        if kind == "slope" and settings.adapter_rank:
            self.adapters = slope.AdapterSchedule(
                self.model, total_steps=settings.steps, fraction=settings.adapter_fraction
            )
        self.forward: torch.nn.Module | Any = self.model
        if compiled:
            self.forward = torch.compile(self.model, backend="slope" if kind == "slope" else "inductor")
        self.step = 0
        self.curves = Curves()
        if self.adapters is not None and self.adapters.active:
            self.curves.switch_step = 0
        self._compiled = compiled
        self.will_compile = compiled
        """Whether the next step has something to compile."""

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step >= self.settings.steps

    def train_step(self, corpus: stdlib_text.Corpus) -> float:
        """Take the next step; return its loss.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        settings = self.settings
        start = time.perf_counter()
        tokens, targets = self._to_device(
            stdlib_text.batch(
                corpus.train,
                seed=settings.seed,
                step=self.step,
                batch=settings.batch,
                context=settings.context,
            )
        )
        # Before the step and not after it, so that gradients are there to be measured between steps.
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.lr_schedule.step()
        switched = self._step_adapters()
        value = float(loss.detach())
        self.step += 1
        self.curves.train_loss.append(value)
        self.curves.seconds.append(time.perf_counter() - start)
        if self.will_compile:
            self.curves.compiling.append(self.step)
        if switched:
            self.curves.switch_step = self.step
        self.will_compile = switched and self._compiled
        if not math.isfinite(value):
            raise FloatingPointError(f"the {self.kind} run's loss is {value} at step {self.step}; try a smaller --lr")
        return value

    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Mean loss over the validation batches, noted in the curves.

        The model runs eagerly here: graphs without gradients, before and after the switch, would cost a short run
        more time to compile than they save, and eager execution is what compiled training is to agree with.
        """
        total = 0.0
        with torch.no_grad(), self._autocast():
            for batch in batches:
                tokens, targets = self._to_device(batch)
                total += float(self.model(tokens, targets))
        loss = total / len(batches)
        self.curves.validation.append((self.step, loss))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain data and tensors; batches follow from the step."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "adapters": None if self.adapters is None else self.adapters.state_dict(),
            "rng": torch.get_rng_state(),
            "curves": dataclasses.asdict(self.curves),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        if self.adapters is not None:
            self.adapters.load_state_dict(state["adapters"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]
        self.curves = Curves.from_dict(state["curves"])

    def _step_adapters(self) -> bool:
        """Step the adapter schedule; return whether it has just switched the adapters on."""
        if self.adapters is None:
            return False
        before = self.adapters.active
        self.adapters.step()
        return self.adapters.active and not before

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0].to(self.device), batch[1].to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, decaying matrices only.  Adapters are among the parameters from the start, without gradients."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
