"""Suite quality: what the method costs in loss, by short pretraining runs that differ in one thing each; several seeds.

The text is the standard library's source code and the model the demo's GPT, smaller.  All runs of a seed begin with the
same weights and see the same batches.  A comparison with a smaller dense model is part of it: half the weights could
also be saved by half the blocks.

What a run of minutes shows is the order of the variants at the beginning of training, and nothing about its end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch

import slope_compile as slope
import stdlib_text
from benchmarks.cases import Case, Measurement, Options, Run
from benchmarks.timing import Summary
from slope_compile.config import ColumnRefresh
from training import Run as Training
from training import Settings

SEEDS = (0, 1, 2)
WARM = 3
"""Steps that are not timed, because loading and compilation happen in them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(Settings):
    """Settings of a run, with the one that the demo has not."""

    column_refresh: ColumnRefresh = 100
    sparse: bool = True

    def slope_config(self) -> slope.SlopeConfig:
        return dataclasses.replace(super().slope_config(), column_refresh=self.column_refresh)


SMALL: dict[str, Any] = {
    "layers": 4, "width": 128, "heads": 4, "context": 64, "batch": 8, "steps": 240, "lr": 2e-3, "adapter_rank": 0,
    "validation_batches": 16,
}  # fmt: skip
"""Four blocks of width 128, 512 tokens a step; the learning rate is that of 1e-3, 2e-3, 3e-3 and 6e-3 at which dense
does best."""
LARGE = SMALL | {"layers": 8, "width": 512, "heads": 8, "context": 256, "batch": 32, "steps": 1500, "lr": 1e-3}
"""On a GPU."""
TINY = SMALL | {"layers": 2, "width": 32, "heads": 2, "context": 16, "batch": 2, "steps": 4, "validation_batches": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"sparse": False},
    "double_pruned": {},
    "exact": {"backward": "exact"},
    "dense_half": {"sparse": False, "half": True},
    "adapters": {"adapter_rank": 0.0625},
    "magnitude": {"mask": "magnitude"},
    "refresh_backward": {"column_refresh": "backward"},
    "refresh_10": {"column_refresh": 10},
    "refresh_never": {"column_refresh": "never"},
    "pattern_2:8": {"pattern": "2:8"},
}
"""Name -> what differs from the default: 2:4, random masks, double-pruned, columns picked every 100 steps."""


def cases(options: Options) -> list[Case]:
    """Every variant of one seed before those of the next, so that a run cut short is a comparison all the same."""
    base = TINY if options.tiny else LARGE if options.device.type == "cuda" else SMALL
    threads = options.threads[0] if options.threads else 1
    found = []
    for seed in SEEDS[:1] if options.tiny else SEEDS:
        for name in VARIANTS:
            case_id = f"quality/gpt-l{base['layers']}-w{base['width']}/{name}/s{seed}"
            run = functools.partial(_run, name, settings(name, base, seed), options.device)
            found.append(Case(case_id, run, threads, limit=900.0, needs=15.0))
    return found


def settings(name: str, base: dict[str, Any], seed: int) -> Variant:
    """Of a variant."""
    changes = dict(VARIANTS[name])
    if changes.pop("half", False):
        changes["layers"] = base["layers"] // 2
    if share := changes.get("adapter_rank"):
        changes["adapter_rank"] = max(1, round(share * base["width"]))
    given = base | {"validate_every": base["steps"], "seed": seed} | changes
    return Variant(**given)


def _run(name: str, variant: Variant, device: torch.device, given: Run) -> Iterator[Measurement]:
    corpus = stdlib_text.load()
    batches = stdlib_text.validation_batches(
        corpus.validation, count=variant.validation_batches, batch=variant.batch, context=variant.context
    )
    training = Training("slope" if variant.sparse else "dense", variant, device=device, compiled=False)
    if variant.sparse:
        # Eager execution has the exact input gradient; the rewritten graph has the variant's own.
        training.forward = torch.compile(training.model, backend=slope.slope, options={"compiler": "aot_eager"})
    while not training.finished:
        training.train_step(corpus)
    loss = training.validate(batches)
    losses = training.curves.train_loss
    tail = max(1, len(losses) // 10)
    state = slope.training_state(training.model, training.optimizer)
    facts = {
        "variant": name,
        "seed": variant.seed,
        "settings": dataclasses.asdict(variant),
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "training_loss": statistics.fmean(losses[-tail:]),
        "curve": [statistics.fmean(losses[i : i + tail]) for i in range(0, len(losses), tail)],
        "tokens": variant.batch * variant.context * variant.steps,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "state_bytes": state.total,
        "text_bytes": len(corpus.train),
    }
    seconds = {"step": Summary.of(training.curves.seconds[WARM:] or training.curves.seconds)}
    yield Measurement("quality", seconds, {}, facts)
