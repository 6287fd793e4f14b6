"""Suite memory: bytes of training state and of inference weights, of whole models, embeddings and heads at full size.

State is measured as what live storages hold after a real step.  It grows by the same amount with every block, so it is
measured at one and at two blocks and continued to the model's own depth; the record has all three.  On a GPU, models
that fit are also trained at full depth for the peak that PyTorch's allocator counts, activations included.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from benchmarks import contestants
from benchmarks.blocks import SIZES, TINY, Size, Whole
from benchmarks.cases import DTYPES, Case, Measurement, Options, Run
from benchmarks.choices import rank
from benchmarks.layers import label
from benchmarks.models import adamw

ON_CPU = ("gpt2-large", "opt-2.7b")
"""Whose embeddings and two blocks fit a small machine."""
PEAKS = {"gpt2-large": (4, 1024), "opt-2.7b": (4, 1024), "opt-6.7b": (1, 1024)}
"""Model -> batch and length of its step at full depth."""
SHARES = (0.0, 0.0156, 0.0625)

State = dict[str, dict[str, int]]
"""Group (linears, adapters, rest) -> kind (weights, metadata, gradients, moments) -> bytes."""


def cases(options: Options) -> list[Case]:
    on_gpu = options.device.type == "cuda"
    sizes = TINY if options.tiny else SIZES if on_gpu else {name: SIZES[name] for name in ON_CPU}
    threads = options.threads[0] if options.threads else torch.get_num_threads()
    found = []
    for dtype in (dtype for dtype in ("bfloat16", "float32") if options.wants(dtype)):
        for name, size in sizes.items():
            # Float32 says the same about ratios: once is enough.
            if dtype == "float32" and name not in (*ON_CPU[:1], *TINY):
                continue
            run = functools.partial(_state, name, size, dtype, options)
            found.append(Case(f"memory/{name}/state/{label(dtype, threads)}", run, threads, limit=240.0, needs=8.0))
        if dtype == "bfloat16" and (on_gpu or options.tiny):
            for name, (B, T) in ({"tiny-llama": (2, 16)} if options.tiny else PEAKS).items():
                run = functools.partial(_peak, name, sizes[name], B, T, dtype, options)
                case_id = f"memory/{name}/peak/b{B}x{T}/{label(dtype, threads)}"
                found.append(Case(case_id, run, threads, limit=240.0, needs=40.0))
    return found


def _state(name: str, size: Size, dtype: str, options: Options, given: Run) -> Iterator[Measurement]:
    """Dense, and SLoPe with adapters of each rank switched on; and the weights that inference needs."""
    measured: dict[int, dict[str, State]] = {depth: _states(size, depth, dtype, options) for depth in (1, 2)}
    facts = {
        "model": name,
        "dtype": dtype,
        "of_layers": size.layers,
        "optimizer": options.optimizer,
        "state": {
            contender: continued(measured[1][contender], measured[2][contender], size.layers)
            for contender in measured[1]
        },
        "measured": {str(depth): states for depth, states in measured.items()},
    }
    yield Measurement("memory", {}, {}, facts)


def continued(one: State, two: State, layers: int) -> State:
    """The state of so many blocks, from that of one block and that of two.

    The first block has linears that the method leaves dense (the first after the input); each further one adds the
    same.
    """
    return {
        group: {kind: one[group][kind] + (layers - 1) * (two[group][kind] - one[group][kind]) for kind in one[group]}
        for group in one
    }


def _states(size: Size, depth: int, dtype: str, options: Options) -> dict[str, State]:
    found: dict[str, State] = {}
    paths: list[str] = []
    for share in SHARES:
        model = _model(size, depth, dtype, options)
        # By magnitude, for the time it takes: see contestants.CONFIG.
        R = rank(size.width, size.width, share) if share else 0
        config = slope.SlopeConfig(adapter_rank=R, mask="magnitude")
        paths = [decision.weight for decision in slope.sparsify_(model, config).sparse]
        if share:
            slope.set_adapters(model, True)
        found[f"slope_r{100 * share:.2f}%" if share else "slope"] = _after_step(model, None, options)
        del model
        _release(options.device)
    model = _model(size, depth, dtype, options)
    found["dense"] = _after_step(model, paths, options)
    found["dense_inference"] = dataclasses.asdict(slope.training_state(model, None, paths))
    _drop_gradients(model, found["dense_inference"])
    # Without a column mask, which only training reads.
    slope.sparsify_(model, slope.SlopeConfig(backward="exact", mask="magnitude"))
    found["slope_inference"] = dataclasses.asdict(slope.training_state(model, None))
    _drop_gradients(model, found["slope_inference"])
    del model
    _release(options.device)
    return found


def _drop_gradients(model: nn.Module, state: State) -> None:
    model.zero_grad(set_to_none=True)
    for kinds in state.values():
        kinds["gradients"] = 0


def _after_step(model: nn.Module, paths: list[str] | None, options: Options) -> State:
    """The state between an optimizer's step and ``zero_grad``."""
    optimizer = adamw(model, options.optimizer)
    tokens = torch.arange(16, device=options.device).remainder(32).view(1, 16)
    _loss(model, tokens).backward()
    optimizer.step()
    return dataclasses.asdict(slope.training_state(model, optimizer, paths))


def _peak(name: str, size: Size, B: int, T: int, dtype: str, options: Options, given: Run) -> Iterator[Measurement]:
    """Most bytes that two training steps at full depth allocate, compiled; and what of it is state."""
    facts: dict[str, Any] = {"model": name, "dtype": dtype, "batch": B, "context": T, "layers": size.layers}
    state: dict[str, State] = {}
    peak: dict[str, int | None] = {}
    paths: list[str] = []
    for contender in ("slope", "dense"):
        model = _model(size, size.layers, dtype, options)
        if contender == "slope":
            report = slope.sparsify_(model, slope.SlopeConfig(mask="magnitude"))
            paths = [decision.weight for decision in report.sparse]
        optimizer = adamw(model, options.optimizer)
        contestants.compile_(model.stack.blocks, contender == "slope", options)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(size.vocabulary, (B, T), generator=generator).to(options.device)
        for _ in range(2):
            if options.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad(set_to_none=True)
            _loss(model, tokens).backward()
            optimizer.step()
        on_gpu = options.device.type == "cuda"
        peak[contender] = torch.cuda.max_memory_allocated() if on_gpu else None
        state[contender] = dataclasses.asdict(slope.training_state(model, optimizer, paths))
        del model, optimizer
        torch.compiler.reset()
        _release(options.device)
    yield Measurement("peak", {}, {}, facts | {"state": state, "peak": peak})


def total(state: Mapping[str, Mapping[str, int]], *groups: str) -> int:
    """Bytes of groups; of all without."""
    return sum(sum(kinds.values()) for group, kinds in state.items() if not groups or group in groups)


def _model(size: Size, depth: int, dtype: str, options: Options) -> Whole:
    torch.manual_seed(0)
    with torch.device(options.device):
        return Whole(size, depth).to(DTYPES[dtype])


def _loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
