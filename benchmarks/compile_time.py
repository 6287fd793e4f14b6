"""Suite compile: what the passes add to the time of compilation, and how that grows with depth.

The model is a narrow LLaMA: the passes see shapes, not values, so that width changes nothing but the time of the code
that Inductor generates.
"""

from __future__ import annotations

import functools
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import slope_compile as slope
from benchmarks.cases import Case, Measurement, Options, Run
from benchmarks.models import prepared
from benchmarks.timing import Summary
from slope_compile.kernels import cpu_library

DEPTHS = (8, 32, 128)
WHOLE = 32
"""Blocks of the model that is also compiled to the end."""
ROUNDS = 3


def cases(options: Options) -> list[Case]:
    depths, whole = ((1, 2), 1) if options.tiny else (DEPTHS, WHOLE)
    return [
        Case(f"compile/llama-l{depth}", functools.partial(_measure, depth=depth, whole=depth == whole), threads=1)
        for depth in depths
    ]


def _measure(run: Run, depth: int, whole: bool) -> Iterable[Measurement]:
    cpu_library.load()  # its compilation happens once on a machine and is not what is measured
    passes, nodes, linears = _passes(depth)
    found = {"passes": Summary.of(passes)}
    if whole:
        found["compilation"] = Summary.of([_whole(depth)])
    facts = {"model": f"llama-l{depth}", "layers": depth, "nodes": nodes, "linears": linears}
    yield Measurement("compile", found, {}, facts)


def _passes(depth: int) -> tuple[list[float], int, int]:
    """Seconds of the backend's own work on a prepared model's graph, round by round; its nodes and sparse linears.

    Without the garbage collector, as ``timeit`` measures: its full collections look at everything that is alive, and so
    grow with the model and whatever else the process holds.
    """
    seen: list[tuple[list[float], int]] = []

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        rounds = []
        for _ in range(ROUNDS):  # each works on a copy of the graph
            with _no_collections():
                begin = time.perf_counter()
                compiled = slope.slope(graph_module, inputs, options={"compiler": "eager"})
                rounds.append(time.perf_counter() - begin)
        seen.append((rounds, len(graph_module.graph.nodes)))
        return compiled

    model, ids = _model(depth)
    linears = len(prepared(model, "double_pruned"))
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(ids, use_cache=False)
    seconds = [sum(graphs) for graphs in zip(*(rounds for rounds, _ in seen), strict=True)]
    return seconds, sum(nodes for _, nodes in seen), linears


def _whole(depth: int) -> float:
    """Seconds of the first training step of a prepared model, nearly all of which is compilation; caches are empty."""
    model, ids = _model(depth)
    prepared(model, "double_pruned")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=slope.slope)
    with _empty_caches():
        begin = time.perf_counter()
        compiled(ids, use_cache=False).logits.sum().backward()
        return time.perf_counter() - begin


@contextmanager
def _no_collections() -> Iterator[None]:
    gc.collect()
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def _empty_caches() -> Iterator[None]:
    """Inductor compiles into a new folder."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _model(depth: int) -> tuple[nn.Module, torch.Tensor]:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), torch.randint(128, (2, 16))
