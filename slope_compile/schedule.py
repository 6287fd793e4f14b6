"""When the adapters come on: ``AdapterSchedule`` and ``set_adapters``.

SLoPe trains without adapters and adds them for the last 1 % of the steps (arXiv 2405.16325, section 2).  Here they
exist from the start, disabled: no compute, no gradient, no optimizer state, and no parameter group has to change when
they come on.  The switch costs one recompilation.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slope_compile.adapter_nodes import has_adapters, set_adapter_nodes
from slope_compile.config import SlopeConfig, checked_config
from slope_compile.distributed import adapters_will_fail, data_parallel
from slope_compile.errors import ConversionError, ScheduleError
from slope_compile.graph_state import ADAPTER_A, ADAPTER_B
from slope_compile.log import log
from slope_compile.optimizers import left_out
from slope_compile.parametrizations import LowRank
from slope_compile.sparsify import add_adapters_


def set_adapters(model: nn.Module, on: bool) -> int:
    """Switch all adapters of a model on or off; returns how many there are.

    A prepared model (or a dense one with adapters, way A) changes what its weights are; the next call of a compiled
    model recompiles.  A transformed GraphModule (way C) has its adapter nodes inserted or removed.

    Raises:
        ScheduleError: the model has no adapters.
    """
    adapters = adapters_of(model)
    for adapter in adapters:
        adapter.enabled = on
    count = len(adapters)
    if isinstance(model, GraphModule):
        count += set_adapter_nodes(model, on)
    if not count:
        raise ScheduleError(
            "set_adapters: the model has no adapters; sparsify_ (or transform) it with "
            "SlopeConfig(adapter_rank=...) above 0"
        )
    return count


def adapters_of(model: nn.Module) -> list[LowRank]:
    """The adapter parametrizations of a model."""
    return [module for module in model.modules() if isinstance(module, LowRank)]


class AdapterSchedule:
    """Counts optimizer steps and switches the adapters on at ``start_step``.

    ::

        schedule = AdapterSchedule(model, total_steps=10_000)    # on for the last 1 %
        for batch in data:
            ...
            optimizer.step(); schedule.step()

    Optionally the adapters get a learning rate of their own: ``lr_scale`` multiplies every update of an adapter (as a
    learning rate scaled by that factor would), rising linearly over ``warmup_steps`` after the switch.  It is applied
    to the updates themselves, so that no parameter group or LR scheduler is touched.

    Args:
        model: a prepared model; a dense model (way A), which is given disabled adapters now and therefore needs
            ``config``; or a transformed GraphModule (way C).
        total_steps: optimizer steps of the run.
        fraction: share of the steps with adapters, from the end; default 0.01 as in the method.
        start_step: number of steps without adapters, instead of ``fraction``.
        config: for a dense model only: which layers get adapters of which rank.
        optimizer: needed for ``lr_scale`` and ``warmup_steps`` only; it may be wrapped, as accelerate does.
        lr_scale: factor on the adapters' updates.
        warmup_steps: steps after the switch over which that factor rises from 0.

    Raises:
        ScheduleError: the model has no adapters, arguments contradict each other, or a DistributedDataParallel around
            the model would fail when the adapters come on.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        fraction: float | None = None,
        start_step: int | None = None,
        config: SlopeConfig | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scale: float = 1.0,
        warmup_steps: int = 0,
    ) -> None:
        for name, value in (("total_steps", total_steps), ("start_step", start_step), ("warmup_steps", warmup_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ScheduleError(f"{name}: expected a number of optimizer steps, an int, got {value!r}")
        if total_steps < 1:
            raise ScheduleError(f"total_steps: expected 1 or more, got {total_steps}")
        if fraction is not None and start_step is not None:
            raise ScheduleError("fraction and start_step both say when the adapters come on; give one of them")
        if fraction is not None and not 0 < fraction <= 1:
            raise ScheduleError(f"fraction: expected above 0, up to 1 (share of steps with adapters), got {fraction}")
        if start_step is not None and start_step < 0:
            raise ScheduleError(f"start_step: expected 0 or more, got {start_step}")
        if start_step is not None and start_step > total_steps:
            raise ScheduleError(
                f"start_step: expected up to total_steps = {total_steps} (which means never), got {start_step}"
            )
        if not lr_scale > 0 or warmup_steps < 0:
            raise ScheduleError(
                f"lr_scale must be positive and warmup_steps not negative, got {lr_scale} and {warmup_steps}"
            )
        if (lr_scale != 1.0 or warmup_steps) and optimizer is None:
            raise ScheduleError("lr_scale and warmup_steps act on the optimizer's updates; pass optimizer=...")
        self.model = model
        self.total_steps = total_steps
        share = 0.01 if fraction is None else fraction
        # Rounded up, but not because 100 * 0.07 is 7.000000000000001 in floating point.
        adapted = math.ceil(total_steps * share * (1 - 1e-12))
        self.start_step = total_steps - adapted if start_step is None else start_step
        self.lr_scale = lr_scale
        self.warmup_steps = warmup_steps
        self.step_count = 0
        self._looked = False
        """Whether the first step has looked at what surrounds the model."""
        self._prepare(config)
        if optimizer is not None:
            _ScaledUpdates(self, optimizer)
        self._apply()
        self._check_wrappers()

    @property
    def active(self) -> bool:
        """Whether the adapters are on for the next step."""
        return self.step_count >= self.start_step

    def update_scale(self) -> float:
        """Factor on the adapters' update in the coming optimizer step."""
        done = self.step_count - self.start_step
        warm = min(1.0, (done + 1) / (self.warmup_steps + 1)) if self.warmup_steps else 1.0
        return self.lr_scale * warm

    def step(self) -> None:
        """Count one optimizer step; call it after ``optimizer.step()``.

        Raises:
            ScheduleError: at the first step: the model is wrapped in a DistributedDataParallel that would fail when the
            adapters come on, or no optimizer has the adapters.
        """
        was = self.active
        if not self._looked:
            self._looked = True
            self._check_wrappers()
            self._check_optimizers()
        self.step_count += 1
        if self.active and not was:
            self._apply()
            log.info("adapters on after step %d of %d", self.step_count, self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; save it beside the model's and the optimizer's."""
        return {
            "step_count": self.step_count,
            "start_step": self.start_step,
            "total_steps": self.total_steps,
            "lr_scale": self.lr_scale,
            "warmup_steps": self.warmup_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state: before, at or after the switch.  The adapters are switched accordingly.

        Raises:
            ScheduleError: the state is not one of a schedule.
        """
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ScheduleError(f"load_state_dict: {', '.join(missing)} missing; not the state of an AdapterSchedule")
        for name in self.state_dict():
            setattr(self, name, state[name])
        self._apply()

    def _prepare(self, config: SlopeConfig | None) -> None:
        if adapters_of(self.model) or (isinstance(self.model, GraphModule) and has_adapters(self.model)):
            if config is not None:
                raise ScheduleError("config: the model has its adapters already; leave config out")
            return
        if config is None:
            raise ScheduleError(
                "AdapterSchedule: the model has no adapters; sparsify_ it with SlopeConfig(adapter_rank=...), or, "
                "to train a dense model with backend='slope', pass config=SlopeConfig(adapter_rank=...) here, before "
                "the optimizer is made"
            )
        try:
            add_adapters_(self.model, checked_config("AdapterSchedule", config))
        except ConversionError as error:
            raise ScheduleError(f"AdapterSchedule: {error}") from error

    def _apply(self) -> None:
        set_adapters(self.model, self.active)

    def _check_wrappers(self) -> None:
        """Raise at construction what would fail only when the adapters come on, at the end of the run."""
        if not self.active and self.start_step < self.total_steps:
            for wrapper in data_parallel(self.adapter_parameters()):
                reason = adapters_will_fail(wrapper)
                if reason is not None:
                    raise ScheduleError(f"AdapterSchedule: {reason}")

    def _check_optimizers(self) -> None:
        """Raise at the first step where no optimizer would train the adapters once they are on."""
        if self.start_step >= self.total_steps:
            return
        missing, optimizers = left_out(self.adapter_parameters(), list(self.model.parameters()))
        if missing:
            names = {id(p): name for name, p in self.model.named_parameters()}
            first = names.get(id(missing[0]), "unnamed")
            raise ScheduleError(
                f"AdapterSchedule: {type(optimizers[0]).__name__} trains the model, but not {len(missing)} parameters "
                f"of its adapters (first: {first!r}); make the optimizer after sparsify_ (way A: after the schedule), "
                "or call optimizer.add_param_group({'params': schedule.adapter_parameters()}), or freeze them "
                "(requires_grad_(False)) to leave them as they are"
            )

    def adapter_parameters(self) -> list[Tensor]:
        """A and B of every adapter."""
        found: list[Tensor] = [p for adapter in adapters_of(self.model) for p in (adapter.A, adapter.B)]
        if isinstance(self.model, GraphModule):
            suffixes = (ADAPTER_A, ADAPTER_B)
            found += [p for name, p in self.model.named_parameters() if name.endswith(suffixes)]
        return found


class _ScaledUpdates:
    """Scales what one optimizer step changes in the adapters, through the optimizer's public step hooks.

    ``p_new = p_old + scale * (p_stepped - p_old)``: for updates linear in the learning rate (AdamW with its decoupled
    decay, SGD, Adam) exactly a learning rate times ``scale``.
    """

    def __init__(self, schedule: AdapterSchedule, optimizer: torch.optim.Optimizer) -> None:
        # Weak, so that the optimizer's hooks do not keep a model alive.
        self.schedule = weakref.ref(schedule)
        self.before: list[tuple[Tensor, Tensor]] = []
        # A wrapper (accelerate's, which Hugging Face's Trainer makes) has no hooks of its own: its __init__ is not that
        # of an Optimizer.  It keeps what it wraps under this name.
        while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = wrapped
        optimizer.register_step_pre_hook(self.remember)
        optimizer.register_step_post_hook(self.rescale)

    def remember(self, *_: Any) -> None:
        schedule = self.schedule()
        if schedule is not None and schedule.active and schedule.update_scale() != 1.0:
            self.before = [(p, p.detach().clone()) for p in schedule.adapter_parameters()]

    @torch.no_grad()
    def rescale(self, *_: Any) -> None:
        schedule = self.schedule()
        if schedule is not None and self.before:
            for parameter, old in self.before:
                parameter.copy_(torch.lerp(old, parameter, schedule.update_scale()))
        self.before = []
