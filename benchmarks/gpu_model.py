"""Suite model: blocks of published models, dense and SLoPe: training steps, prefill, decoding; time and memory.

A few blocks, for both contenders side by side, since they are timed in turns: each further block adds the same, and
together their weights are far more than a cache holds.  The record says how many.  Both sides have flash attention,
are compiled block by block with the same options, one code for all blocks, and train with the same fused AdamW.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import slope_compile as slope
from benchmarks import contestants
from benchmarks.blocks import SIZES, TINY, Blocks, Cache, Size
from benchmarks.cases import DTYPES, Case, Measurement, Options, Run, compare
from benchmarks.contestants import DENSE, SPARSE, Contestants
from benchmarks.gpu_layer import floors
from benchmarks.layers import label
from benchmarks.limits import limits
from benchmarks.models import adamw

MEASURED = ("llama-3-8b", "opt-13b", "gpt2-large", "opt-6.7b", "opt-2.7b", "mistral-7b")
"""Mistral's blocks are those of LLaMA-3 and come last."""
FIRST = (
    "llama-3-8b/train/b8x2048/r1.56%", "llama-3-8b/prefill/b8x2048", "llama-3-8b/decode/b1",
    "opt-13b/train/b8x2048/r1.56%", "llama-3-8b/decode/b8", "opt-13b/decode/b1", "llama-3-8b/decode/b64",
    "opt-13b/prefill/b8x2048",
)  # fmt: skip
"""What a run of a few minutes should have."""
SEQUENCES = ((8, 2048), (1, 2048))
"""Batch and length of training and prefill."""
BATCHES = (1, 8, 64)
CACHE = 1024
"""Tokens in the cache of a decoding step."""
SHARES = (0.0156, 0.0625)
"""Ranks of the adapters, as a share of the width."""
BLOCKS = 4
"""Of a model, at most; ``--layers`` asks for another number."""
MARGIN = 0.85
"""Of the free memory: what the estimate may plan with."""


def cases(options: Options) -> list[Case]:
    sizes = TINY if options.tiny else {name: SIZES[name] for name in MEASURED}
    sequences = ((2, 16), (1, 8)) if options.tiny else SEQUENCES
    dtypes = [dtype for dtype in ("bfloat16",) if options.wants(dtype)]
    threads = options.threads[0] if options.threads else torch.get_num_threads()
    ranked: list[tuple[int, Case]] = []
    for dtype in dtypes:
        for place, (name, size) in enumerate(sizes.items()):
            end = label(dtype, threads)

            def add(rank: int, what: str, run: Any, needs: float, name: str = name, end: str = end) -> None:
                case = Case(f"model/{name}/{what}/{end}", run, threads, seconds=4.0, limit=280.0, needs=needs)
                first = f"{name}/{what}"
                ranked.append((FIRST.index(first) - len(FIRST) if first in FIRST else rank, case))

            for number, (B, T) in enumerate(sequences):
                for share in SHARES:
                    train = functools.partial(_train, name, size, B, T, share, dtype, options)
                    late = number + (share != SHARES[0])
                    add(10 * late + place, f"train/b{B}x{T}/r{100 * share:.2f}%", train, 30.0)
                prefill = functools.partial(_prefill, name, size, B, T, dtype, options)
                add(10 * number + place + 1, f"prefill/b{B}x{T}", prefill, 15.0)
            for number, B in enumerate((1, 2) if options.tiny else BATCHES):
                decode = functools.partial(_decode, name, size, B, dtype, options)
                add(10 * number + place + 2, f"decode/b{B}", decode, 15.0)
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def _train(
    name: str, size: Size, B: int, T: int, share: float, dtype: str, options: Options, given: Run
) -> Iterator[Measurement]:
    floor = _floor("train", size, B * T, dtype, options)

    def measured(layers: int) -> Measurement:
        found = _contestants(size, layers, share, dtype, options)
        optimizers = {DENSE: adamw(found.dense, options.optimizer), SPARSE: adamw(found.sparse, options.optimizer)}
        shape = (B, T, size.width)
        x = torch.randn(shape, device=options.device).to(DTYPES[dtype]).requires_grad_()
        grad = torch.randn(shape, device=options.device).to(DTYPES[dtype]) / (B * T)

        def step(contender: str) -> None:
            optimizer = optimizers[DENSE if contender == DENSE else SPARSE]
            contestants.step(found.of(contender), x, grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        names = found.names()
        samples = given.measure({each: functools.partial(_ignoring_index, step, each) for each in names})
        activations, state = {}, {}
        for each in names:
            before = _allocated(options.device)
            contestants.step(found.of(each), x, grad)
            state[each] = contestants.state_of(found, optimizers)[DENSE if each == DENSE else SPARSE]
            if each == SPARSE:  # Its adapters are there for the other contender alone.
                state[each]["adapters"] = dict.fromkeys(state[each]["adapters"], 0)
            gradients = sum(group["gradients"] for group in state[each].values())
            peak = _peak(options.device)
            activations[each] = None if peak is None else peak - before - gradients
            optimizers[DENSE if each == DENSE else SPARSE].zero_grad(set_to_none=True)
        facts = _facts(name, size, layers, dtype, found, options, floor) | {
            "batch": B, "context": T, "tokens": B * T, "state": state, "activations": activations,
            "optimizer": options.optimizer,
            # A step that refreshes the column masks is one in a hundred, and is not among those that were timed.
            "refresh_seconds": given.watch.seconds([lambda: slope.refresh_columns_(found.sparse)]),
        }  # fmt: skip
        return compare("block_train", samples, {each: [each] for each in names}, (DENSE, SPARSE), facts)

    # Weights, gradients and two moments in the weights' dtype; a sparse linear has half of that and its patterns.
    states = 4 * DTYPES[dtype].itemsize * size.block_parameters * (1 + 0.55)
    activations = B * T * DTYPES[dtype].itemsize * (12 * size.width + 4 * size.mlp)
    yield _fitting(measured, states + activations, size, options)


def _prefill(name: str, size: Size, B: int, T: int, dtype: str, options: Options, given: Run) -> Iterator[Measurement]:
    floor = _floor("prefill", size, B * T, dtype, options)

    def measured(layers: int) -> Measurement:
        found = _contestants(size, layers, SHARES[0], dtype, options)
        x = torch.randn(B, T, size.width, device=options.device).to(DTYPES[dtype])

        def forward(contender: str) -> None:
            found.of(contender)(x)

        names = found.names()
        samples = given.measure({each: functools.partial(_ignoring_index, forward, each) for each in names})
        facts = _facts(name, size, layers, dtype, found, options, floor)
        facts |= {"batch": B, "context": T, "tokens": B * T}
        facts["activations"] = {each: _taken(functools.partial(forward, each), options.device) for each in names}
        return compare("block_prefill", samples, {each: [each] for each in names}, (DENSE, SPARSE), facts)

    with torch.no_grad():
        yield _fitting(measured, _weights(size, dtype), size, options)


def _decode(name: str, size: Size, B: int, dtype: str, options: Options, given: Run) -> Iterator[Measurement]:
    length = 8 if options.tiny else CACHE
    floor = _floor("decode", size, B, dtype, options)

    def measured(layers: int) -> Measurement:
        found = _contestants(size, layers, SHARES[0], dtype, options)
        x = torch.randn(B, 1, size.width, device=options.device).to(DTYPES[dtype])
        caches = [Cache(size, B, length, x) for _ in range(layers)]

        def decode(contender: str) -> None:
            found.of(contender)(x, caches)

        names = found.names()
        calls = {each: functools.partial(_ignoring_index, decode, each) for each in names}
        samples = given.measure(calls, calls=1)
        facts = _facts(name, size, layers, dtype, found, options, floor)
        facts |= {"batch": B, "cache": length, "tokens": B}
        facts["activations"] = {each: _taken(functools.partial(decode, each), options.device) for each in names}
        return compare("block_decode", samples, {each: [each] for each in names}, (DENSE, SPARSE), facts)

    cache = 2 * B * size.groups * length * (size.width // size.heads) * DTYPES[dtype].itemsize
    with torch.no_grad():
        yield _fitting(measured, _weights(size, dtype) + cache, size, options)


def _contestants(size: Size, layers: int, share: float, dtype: str, options: Options) -> Contestants:
    def make() -> Blocks:
        return Blocks(size, layers)

    found = contestants.draw(make, size.width, share, DTYPES[dtype], options, "double_pruned")
    for module, sparse in ((found.dense, False), (found.sparse, True)):
        assert isinstance(module, Blocks)
        contestants.compile_(module.blocks, sparse, options)
    return found


def _ignoring_index(call: Callable[[str], None], contender: str, _: int) -> None:
    call(contender)


def _fitting(measured: Callable[[int], Measurement], per_layer: float, size: Size, options: Options) -> Measurement:
    """Measure with :data:`BLOCKS` blocks, with fewer where they do not fit."""
    layers = options.layers or min(BLOCKS, size.layers)
    if options.device.type == "cuda" and not options.layers:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(options.device)
        layers = max(1, min(layers, int(MARGIN * free / per_layer)))
    while True:
        try:
            with _flash(options.device):
                return measured(layers)
        except torch.OutOfMemoryError:
            if layers == 1:
                raise
            layers = max(1, int(0.7 * layers))
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _flash(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Flash attention or an error, never a slower one unnoticed; a CPU has its own."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def _weights(size: Size, dtype: str) -> float:
    """Bytes of a block's linears, dense and 2:4 together."""
    return DTYPES[dtype].itemsize * size.block_parameters * (1 + 0.6)


Floor = Callable[[int], dict[str, dict[str, Any]]]
"""Number of blocks -> the least time of their linears."""


def _floor(what: str, size: Size, M: int, dtype: str, options: Options) -> Floor:
    """The limits are measured here and now, while there is memory left for it."""
    return functools.partial(floors, what, size, M, dtype, limits(options.device, dtype))


def _facts(
    name: str, size: Size, layers: int, dtype: str, found: Contestants, options: Options, floor: Floor
) -> dict[str, Any]:
    return {
        # Of the linears alone: attention, norms and the optimizer come on top.
        "floor": floor(layers),
        "model": name,
        "layers": layers,
        "of_layers": size.layers,
        "dtype": dtype,
        "rank": found.R,
        "rank_share": found.R / size.width,
        "sparse_linears": len(found.paths),
        "autotune": options.autotune,
        "weights": {
            each: sum(p.numel() * p.itemsize for p in [*module.parameters(), *module.buffers()])
            for each, module in ((DENSE, found.dense), (SPARSE, found.sparse))
        },
    }


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _taken(call: Callable[[], None], device: torch.device) -> int | None:
    """Most bytes that a call takes beside what was there before; None where nobody counts them."""
    before = _allocated(device)
    call()
    peak = _peak(device)
    return None if peak is None else peak - before


def _peak(device: torch.device) -> int | None:
    """Most bytes since ``_allocated``; None where nobody counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
