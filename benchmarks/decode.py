"""Cases of decoding: one token a sequence and step with a static key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor import config as inductor_config

import slope_compile as slope
from benchmarks import select
from benchmarks.cases import AUTOCAST, Case, Measurement, Options, Run, compare
from benchmarks.layers import label
from benchmarks.models import Subject, prepared

PROMPT, LENGTH = 32, 64
"""Tokens in the cache at first, and at most; after the last the cache goes back to the prompt."""

CONTENDERS: dict[str, tuple[str, bool]] = {
    "dense": ("inductor", False),
    # Weights become constants that Inductor may repack once: the best that dense inference has.
    "frozen": ("inductor", True),
    "slope": ("slope", False),
    select.DROP_IN: ("slope", False),
}
"""Contender -> backend, and whether Inductor freezes the weights."""


class Decoder:
    """One compiled model with its cache; calling it decodes one token of each sequence."""

    def __init__(self, subject: Subject, contender: str, batch: int, dtype: str, device: torch.device) -> None:
        from transformers import StaticCache

        backend, frozen = CONTENDERS[contender]
        loss = subject.build(dtype).to(device).eval()
        if contender == "slope":
            prepared(loss, "exact")
        model: Any = loss.get_submodule("model")
        self.cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        model(input_ids=subject.tokens(batch, PROMPT, device), past_key_values=self.cache, use_cache=True)
        self.step: Any = torch.compile(model, backend=slope.slope if backend == "slope" else backend)
        self.token = subject.tokens(batch, 1, device)
        self.filled = PROMPT
        # Dynamo reads this setting too, when it traces: as an option of torch.compile it would have no effect.
        with inductor_config.patch(freezing=frozen):
            self(0)

    def __call__(self, _: int) -> object:
        if self.filled == LENGTH:
            self.filled = PROMPT
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(PROMPT)
        self.filled += 1
        return self.step(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits


def decode_case(
    subject: Subject, batch: int, dtype: str, threads: int, options: Options, ours: str = "slope"
) -> Case:
    """Decoding with SLoPe weights (without adapters) against dense ones, compiled and compiled with freezing.

    Args:
        ours: "slope", prepared, or "slope_drop_in", a dense model that the backend prunes.
    """
    assert dtype != AUTOCAST

    @torch.no_grad()
    def run(given: Run) -> Iterator[Measurement]:
        contenders = ("dense", "frozen", ours)
        decoders = {name: Decoder(subject, name, batch, dtype, options.device) for name in contenders}
        samples = given.measure(decoders)
        facts = {"model": subject.name, "batch": batch, "tokens": batch, "cache": LENGTH, "dtype": dtype}
        yield compare("decode", samples, {name: [name] for name in decoders}, ("dense", "frozen"), facts)

    suffix = ours.removeprefix("slope").replace("_", "-")
    name = f"model/{subject.name}/decode{suffix}/b{batch}/{label(dtype, threads)}"
    return Case(name, run, threads, seconds=20.0, limit=1800.0)
