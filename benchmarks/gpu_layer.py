"""Suite layer: the linears of published blocks alone, compiled with ``torch.compile``.

A module calls every linear of a block on an activation of its own; dense, SLoPe and SLoPe with adapters are compiled
alike.  ``forward`` is inference (few tokens: decoding), ``train`` a forward and a backward pass without an optimizer.
The linears come from so many blocks that no cache holds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import contestants, rotation, torchao_layer
from benchmarks.blocks import SIZES, TINY, Size
from benchmarks.cases import DTYPES, Case, Measurement, Options, Run, compare
from benchmarks.contestants import DENSE, SPARSE, Contestants
from benchmarks.layers import label
from benchmarks.limits import Limits, limits
from benchmarks.timing import Contender
from slope_compile.cost import Cost, Layer

MEASURED = ("llama-3-8b", "opt-13b", "gpt2-large", "opt-2.7b")
FORWARD = (1, 16384, 8, 64, 512)
TRAIN = (16384, 2048)
SHARE = 0.0156


class Linears(nn.Module):
    """The linears of one block: activations by in_features ``[M, K]`` -> outputs."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.inputs = [K for _, K in shapes(size)]
        self.layers = nn.ModuleList(nn.Linear(K, N, bias=size.family == "gpt") for N, K in shapes(size))

    def forward(self, activations: dict[int, Tensor]) -> list[Tensor]:
        return [layer(activations[K]) for layer, K in zip(self.layers, self.inputs, strict=True)]


def shapes(size: Size) -> list[tuple[int, int]]:
    """``(N, K)`` of a block's linears."""
    D, kv = size.width, size.groups * (size.width // size.heads)
    attention = [(3 * D, D), (D, D)] if size.fused_qkv else [(D, D), (kv, D), (kv, D), (D, D)]
    return attention + [(size.mlp, D)] * (2 if size.family == "llama" else 1) + [(D, size.mlp)]


def cases(options: Options) -> list[Case]:
    sizes = TINY if options.tiny else {name: SIZES[name] for name in MEASURED}
    threads = options.threads[0] if options.threads else torch.get_num_threads()
    found = []
    for dtype in (dtype for dtype in ("bfloat16",) if options.wants(dtype)):
        for place in range(max(len(FORWARD), len(TRAIN))):
            for name, size in sizes.items():
                for what, tokens in (("forward", FORWARD), ("train", TRAIN)):
                    if place < len(tokens):
                        M = (4, 8, 2, 1, 16)[place] if options.tiny else tokens[place]
                        run = functools.partial(_measure, what, name, size, M, dtype, options)
                        case_id = f"layer/{name}/{what}/m{M}/{label(dtype, threads)}"
                        found.append(Case(case_id, run, threads, seconds=5.0, limit=200.0, needs=25.0))
    return found


def _measure(
    what: str, name: str, size: Size, M: int, dtype: str, options: Options, given: Run
) -> Iterator[Measurement]:
    stored = sum(N * K for N, K in shapes(size)) * DTYPES[dtype].itemsize * 9 // 16
    copies = 1 if options.tiny else rotation.copies(stored, rotation.cache_bytes(options.device))

    def make() -> nn.ModuleList:
        return nn.ModuleList(Linears(size) for _ in range(copies))

    found = contestants.draw(make, size.width, SHARE, DTYPES[dtype], options, "double_pruned")
    for stack, sparse in ((found.dense, False), (found.sparse, True)):
        contestants.compile_(stack.children(), sparse, options)

    def numbers(features: int) -> Tensor:
        return torch.randn(M, features, device=options.device).to(DTYPES[dtype])

    activations = {K: numbers(K).requires_grad_(what == "train") for _, K in shapes(size)}
    grads = [numbers(N) for N, _ in shapes(size)]
    calls: dict[str, Contender] = {
        contender: _call(what, functools.partial(_stack, found, contender), copies, activations, grads)
        for contender in found.names()
    }
    left_out = {}
    if what == "train":
        try:
            peer = torchao_layer.converted(found.dense)
            contestants.compile_(peer.children(), False, options)
            calls["torchao"] = _call(what, lambda: peer, copies, activations, grads)
            calls["torchao"](0)
        except Exception as error:  # Of whatever kind: a peer that is missing must not lose the case.
            calls.pop("torchao", None)
            left_out["torchao"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    with torch.set_grad_enabled(what == "train"):
        samples = given.measure(calls, calls=copies if what == "forward" else 0)
    known = limits(options.device, dtype)
    facts = {
        "model": name, "tokens": M, "dtype": dtype, "rank": found.R, "copies": copies, "left_out": left_out,
        "shapes": shapes(size), "autotune": options.autotune,
        "floor": floors(what, size, M, dtype, known),
    }  # fmt: skip
    baselines = (DENSE, SPARSE)
    yield compare(f"linears_{what}", samples, {each: [each] for each in calls}, baselines, facts)


def _stack(found: Contestants, contender: str) -> nn.Module:
    return found.of(contender)


def _call(
    what: str, stack: Callable[[], nn.Module], copies: int, activations: dict[int, Tensor], grads: list[Tensor]
) -> Contender:
    def call(index: int) -> None:
        module = list(stack().children())[index % copies]
        outputs = module(activations)
        if what == "train":
            torch.autograd.backward(outputs, grads)
            for leaf in [*module.parameters(), *activations.values()]:
                leaf.grad = None

    return call


def floors(what: str, size: Size, M: int, dtype: str, known: Limits, blocks: int = 1) -> dict[str, dict[str, Any]]:
    """Seconds that the linears of so many blocks take at least, dense and 2:4, and what bounds them.

    Args:
        what: "train" (all three products) or anything else (forward).
    """
    layers = [Layer(N, K, DTYPES[dtype].itemsize) for N, K in shapes(size)]
    tokens: Any = M
    dense = [layer.dense_training(tokens) if what == "train" else layer.dense_forward(tokens) for layer in layers]
    sparse = [layer.training(tokens) if what == "train" else layer.forward(tokens) for layer in layers]
    found = {}
    for kind, costs in (("dense", dense), ("sparse", sparse)):
        seconds, bound = known.floor(sum(costs, Cost(())))
        found[kind] = {"seconds": blocks * seconds, "bound": bound}
    return found
