"""Suite kernels: every product of a layer, in every way that the library and its peers have, against cuBLAS.

Written for a GPU.  It runs on a CPU too, where only ``--tiny`` makes sense: that is how its code is tested.

The most informative cases come first: a run that is cut off has the shapes of width 4096 in bfloat16, from the 16384
tokens of a training step to the single token of decoding.  The contenders are the library's operators, each way that
compiled code may take, and the peers; they take a minute or two.  With ``--tiles`` all tiles of an autotuner are
measured too, and products compiled with max_autotune.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import choices, peers
from benchmarks.cases import DTYPES as TORCH_DTYPES
from benchmarks.cases import Case, Measurement, Options, Run, compare
from benchmarks.choices import Choice
from benchmarks.layers import column_case, label
from benchmarks.limits import limits, limits_case
from benchmarks.products import STEPS, TOLERANCE, Problem, error_of, own_errors
from benchmarks.timing import Contender
from slope_compile.cost import Cost, Layer

HIDDEN = (4096, 5120, 768, 2048, 1024, 2560, 8192)
"""All tokens of the first come before the others."""
TOKENS = (16384, 1, 2048, 16, 64, 256, 1024, 4)
DTYPES = ("bfloat16", "float16")
LOW_RANK = 0.0156
"""Rank of the adapters, as a share of the layer's smaller side: the method's middle one."""
Key = tuple[str, int, int, int]
"""dtype, M, N, K."""


def cases(options: Options) -> list[Case]:
    threads = options.threads[0] if options.threads else 1
    dtypes = [dtype for dtype in DTYPES if options.wants(dtype)]
    found = [limits_case("kernels", dtype, options.device) for dtype in dtypes]
    seconds, needs = (3.0, 60.0) if options.tiles else (1.0, 4.0)
    for dtype, some_hidden in _parts(options, dtypes):
        keys = list(_keys(some_hidden, options, dtype))
        for dtype, M, N, K in keys:
            measure = functools.partial(_measure, (M, N, K), dtype, options.device, options.tiles)
            name = f"kernels/{N}x{K}/m{M}/{label(dtype, threads)}"
            found.append(Case(name, measure, threads, seconds=seconds, limit=180.0, needs=needs))
        for N, K in dict.fromkeys((N, K) for _, _, N, K in keys):
            found.append(column_case("kernels", (N, K), dtype, threads, options.device))
    return found


def _parts(options: Options, dtypes: list[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Dtypes and hidden sizes that are measured one part after the other."""
    if options.tiny:
        yield from ((dtype, (64,)) for dtype in dtypes)
        return
    for dtype in dtypes:
        yield from ((dtype, sizes) for sizes in (HIDDEN[:1], HIDDEN[1:]))


def _keys(some_hidden: tuple[int, ...], options: Options, dtype: str) -> Iterator[Key]:
    for M in (16, 1) if options.tiny else TOKENS:
        for d in some_hidden:
            yield from ((dtype, M, N, K) for N, K in ((d, d), (4 * d, d), (d, 4 * d)))


def _measure(
    shape: tuple[int, int, int], dtype: str, device: torch.device, tiles: bool, given: Run
) -> Iterator[Measurement]:
    with torch.no_grad():
        yield from _measured(shape, dtype, device, tiles, given)


def _measured(
    shape: tuple[int, int, int], dtype: str, device: torch.device, tiles: bool, given: Run
) -> Iterator[Measurement]:
    M, N, K = shape
    problem = Problem.draw(M, N, K, dtype, device)
    # Without CUDA graphs of its own: their copies of the inputs would be timed with the dense products.
    compiled: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if device.type == "cuda" else {}
    products = problem.products(compiled)
    truths = problem.truths() | {"low_rank": choices.low_rank_truth(problem, LOW_RANK)}
    errors = own_errors(products, truths, TORCH_DTYPES[dtype])
    if not tiles:
        for contenders in products.values():
            del contenders["compiled"]
    products["low_rank"] = choices.low_rank(problem, LOW_RANK)
    errors["low_rank_slope_adapter"] = error_of(products["low_rank"]["slope_adapter"](0), truths["low_rank"])
    if tiles or (N == K and M in TOKENS[:1]):  # A search takes seconds for each layer.
        choices.verify(device, dtype, M, N, K)
    offered = [*choices.library(problem, LOW_RANK, tiles), *peers.choices(problem)]
    offered += choices.autotuned(problem) if tiles else []
    left_out: dict[str, str] = {}
    for choice in offered:
        contender, error = _tried(choice, truths, TOLERANCE[TORCH_DTYPES[dtype]])
        if isinstance(contender, str):
            left_out[f"{choice.product}: {choice.name}"] = contender
        else:
            products[choice.product][choice.name] = contender
            errors[f"{choice.product}_{choice.name}"] = error
    del truths
    parts = {f"{p}:{c}": call for p, contenders in products.items() for c, call in contenders.items()}
    samples = given.measure(parts, calls=len(problem.weights))
    known = limits(device, dtype)
    facts = problem.facts | {
        "limits": {"bandwidth": known.bandwidth, "flops": known.flops},
        "rank": choices.rank(N, K, LOW_RANK),
    }
    for product, contenders in products.items():
        names = {contender: [f"{product}:{contender}"] for contender in contenders}
        own = {
            "errors": {name: error for name, error in errors.items() if name.startswith(product)},
            "left_out": {name: why for name, why in left_out.items() if name.startswith(product)},
            "floor": {
                kind: dict(zip(("seconds", "bound"), known.floor(cost), strict=True))
                for kind, cost in _costs(product, problem).items()
            },
        }
        yield compare(product, samples, names, _baselines(contenders), facts | own)
    steps = {
        name: [f"{p}:{part}" for p, part in pairs]
        for name, pairs in STEPS.items()
        if all(part in products[p] for p, part in pairs)
    }
    yield compare("step", samples, steps, _baselines(steps), facts)


def _baselines(contenders: Any) -> list[str]:
    return [name for name in ("dense", "compiled") if name in contenders]


def _tried(choice: Choice, truths: dict[str, Any], tolerance: float) -> tuple[Contender | str, float]:
    """A contender that runs and is right, with its error; or why it is left out."""
    try:
        contender = choice.make()
        error = error_of(contender(0), truths[choice.truth])
    except Exception as failure:  # Of whatever kind: a peer that is missing must not lose the case.
        lines = str(failure).strip().splitlines() or [""]
        return f"{type(failure).__name__}: {lines[0][:200]}", float("inf")
    if not error <= tolerance:
        return f"wrong: its error is {error:.3g} of the largest entry, above {tolerance:g}", error
    return contender, error


def _costs(product: str, problem: Problem) -> dict[str, Cost]:
    """What the product has to compute and move, dense and 2:4."""
    layer = Layer(problem.N, problem.K, TORCH_DTYPES[problem.dtype].itemsize, double_pruned=problem.N % 4 == 0)
    tokens: Any = problem.M
    dense = {work.name: Cost((work,)) for work in layer.dense_training(tokens).works}
    sparse = {
        "forward": layer.forward(tokens),
        "grad_input": layer.grad_input(tokens),
        "grad_weight": layer.grad_weight(tokens),
    }
    name = "forward" if product == "low_rank" else product
    return {"dense": dense[name], "sparse": sparse[name]}
