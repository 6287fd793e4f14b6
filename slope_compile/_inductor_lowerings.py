"""How Inductor calls the products on a CPU: directly, and under ``max_autotune`` by the way that it measures as faster.

Without these lowerings an operator is one opaque call through the dispatcher; that stays so for other devices (GPUs
have lowerings in ``_inductor_gpu``), for patterns and dtypes that the CPU library does not know, and under
``cpp_wrapper`` (whose C++ code cannot call Python functions but does call operators).

They apply to graphs that the backend compiles, and to no others in the process.  Inductor's caches must not mix the
two: code from a cache runs in processes that may never have called :func:`register`.  So a graph that is to be lowered
this way carries a :class:`Mark` in Inductor's options, where it is part of every cache key.

Private names used, tested on torch 2.11 and 2.13: ``torch._inductor.select_algorithm.ExternKernelChoice``,
``autotune_select_algorithm``, ``realize_inputs``; ``lowering.register_lowering``, ``fallback_handler``, ``view``;
``ir.FixedLayout``; ``virtualized.V.graph.cpp_wrapper``; ``custom_graph_pass.CustomGraphPass``; ``utils.sympy_product``.
Importing this module imports Inductor: only where a graph is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config, ir
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, view
from torch._inductor.select_algorithm import ExternKernelChoice, autotune_select_algorithm, realize_inputs
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V

from slope_compile.kernels import cpu_calls, cpu_library, cpu_products, ops
from slope_compile.kernels.metadata import pack_mask, packed_width

MARK = "post_grad_custom_post_pass"
"""The option that carries the mark: one of the few that Inductor lets anybody extend."""

VERSION = 2
"""Part of the kernels' names and of the cache keys: code generated for another version is not run."""

LEGAL_PATTERN = 0x33
"""The byte that the autotuner fills a pattern with: it keeps two entries of every group."""

Generator = Callable[[Any], Tensor]
"""Inductor's node of an input -> a tensor for the autotuner to measure with."""


class Mark(CustomGraphPass):
    """Marks what is being compiled as the backend's; runs the pass of the same place that the user may have set."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.inner if isinstance(self.inner, list | tuple) else [self.inner]:
            if each is not None:
                each(graph)

    def uuid(self) -> Any:
        """None, which means no caching, where the user's pass has none."""
        own = f"slope_compile {VERSION} {_gpu().fingerprint()}"
        if self.inner is None:
            return own
        uuid = self.inner.uuid() if isinstance(self.inner, CustomGraphPass) else None
        return None if uuid is None else (own, uuid)


def marked(patches: dict[str, Any]) -> dict[str, Any]:
    """Inductor's options for a graph of the backend; registers the lowerings at the first call."""
    register()
    return {**patches, MARK: Mark(patches.get(MARK, getattr(config, MARK)))}


@functools.cache
def register() -> None:
    """Tell Inductor of the kernels and the lowerings, once in a process."""
    _kernels()
    gpu = _gpu().Lowerings(str(VERSION))
    for op, cpu, cuda in (
        (ops.linear, _linear, gpu.linear),
        (ops.grad_input, _grad_input, gpu.grad_input),
        (ops.grad_input_columns, _grad_input_columns, gpu.grad_input_columns),
        (ops.grad_weight, _grad_weight, gpu.grad_weight),
    ):
        register_lowering(op, type_promotion_kind=None)(_or_operator(op, {"cpu": cpu, "cuda": cuda}))


def _gpu() -> Any:
    """The lowerings for GPUs, which import this module."""
    from slope_compile import _inductor_gpu

    return _inductor_gpu


def _or_operator(op: Any, lower: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """``lower`` of the device, or the operator itself where that returns None or the graph is not the backend's."""
    fallback = lowerings.get(op) or fallback_handler(op, add_to_fallback_set=False)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        device = args[0].get_device().type
        if device in lower and isinstance(getattr(config, MARK), Mark) and not V.graph.cpp_wrapper:
            lowered = lower[device](*args, **kwargs)
            if lowered is not None:
                return lowered
        return fallback(*_all_arguments(op, args, kwargs))

    return lowering


def _all_arguments(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call with the defaults that the graph left out: Inductor's C++ code does not add them."""
    rest = op._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest)]


_CALLS = {
    "linear": cpu_calls.linear,
    "linear_low_rank": cpu_calls.linear_low_rank,
    "grad_input": cpu_calls.grad_input,
    "grad_input_columns": cpu_calls.grad_input_columns,
    "grad_weight": cpu_calls.grad_weight,
}
_DECIDED_AT_RUN_TIME: dict[str, dict[str, bool]] = {"": {}}
_MEASURED = {"_2to4": {"sparse": True}, "_expanded": {"sparse": False}}


@functools.cache
def _kernels() -> dict[str, ExternKernelChoice]:
    """Every kernel under the name by which generated code calls it, whether this process or another generated it."""
    ways = _DECIDED_AT_RUN_TIME | _MEASURED
    names = {f"slope_{name}_{VERSION}{way}": call for name, call in _CALLS.items() for way in ways}
    return {name: ExternKernelChoice(call, name=name) for name, call in names.items()}


def _product(name: str, inputs: Sequence[Any], generators: dict[int, Generator], sizes: Sequence[Any]) -> Any:
    """One product of matrices ``inputs`` into a new ``[sizes]`` of the first one's dtype.

    ``generators``: for the inputs, by index, that random numbers will not do for.
    """
    nodes = realize_inputs(*inputs)
    layout = ir.FixedLayout(nodes[0].get_device(), nodes[0].get_dtype(), list(sizes))
    ways = _MEASURED if config.max_autotune or config.max_autotune_gemm else _DECIDED_AT_RUN_TIME
    choices = [_kernels()[f"slope_{name}_{VERSION}{suffix}"].bind(nodes, layout, **way) for suffix, way in ways.items()]
    return result_of(autotune_select_algorithm(f"slope_{name}", choices, nodes, layout, input_gen_fns=generators))


def result_of(selected: Any) -> Any:
    """The result of ``autotune_select_algorithm``: torch 2.13 returns it in a tuple with the choice that was made."""
    return selected[0] if isinstance(selected, tuple) else selected


def _pattern(N: Any, K: Any) -> Generator:
    """A generator of patterns by the weight's sizes.

    The sizes of the node itself are symbols where the backend added the pattern as an input.
    """
    return functools.partial(_legal_pattern, N, K)


def _legal_pattern(N: Any, K: Any, node: Any) -> Tensor:
    return torch.full((int(N), packed_width(int(K))), LEGAL_PATTERN, dtype=torch.uint8, device="cpu")


def _column_mask(N: Any, K: Any) -> Generator:
    """A generator of column masks that keep 13 of 16 values, as the second pruning of a random 2:4 weight does."""
    return functools.partial(_likely_column_mask, N, K)


def _likely_column_mask(N: Any, K: Any, node: Any) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    size = (int(N), int(K) // 2)
    return pack_mask(torch.randint(16, size, generator=generator, dtype=torch.uint8, device="cpu") < 13)


def _applies(keep: int, group: int, *tensors: Any) -> bool:
    """Whether the CPU library has a kernel: see ``cpu_ops.library_for``."""
    present = [tensor for tensor in tensors if tensor is not None]
    dtypes = {tensor.get_dtype() for tensor in present}
    return (
        (keep, group) == (2, 4)
        and all(tensor.get_device().type == "cpu" for tensor in present)
        and len(dtypes) == 1
        and dtypes <= cpu_products.CODES.keys()
        and cpu_library.load() is not None
    )


def matrix(x: Any) -> Any:
    """``[..., features]`` as ``[M, features]``."""
    sizes = x.get_size()
    return x if len(sizes) == 2 else view(x, [sympy_product(sizes[:-1]), sizes[-1]])


def like(product: Any, x: Any, features: Any) -> Any:
    """``[M, features]`` as ``[..., features]``."""
    sizes = x.get_size()
    return product if len(sizes) == 2 else view(product, [*sizes[:-1], features])


def _linear(
    x: Any,
    values: Any,
    pattern: Any,
    bias: Any,
    keep: int,
    group: int,
    double_pruned: bool = False,
    column_mask: Any = None,
    down: Any = None,
    up: Any = None,
) -> Any | None:
    if not _applies(keep, group, x, values, bias, down, up):
        return None
    (N, half), rows = values.get_size(), matrix(x)
    low_rank = [] if down is None else [matrix(down), up]
    inputs = [rows, values, pattern, *low_rank] + ([] if bias is None else [bias])
    name = "linear_low_rank" if low_rank else "linear"
    y = _product(name, inputs, {2: _pattern(N, 2 * half)}, [rows.get_size()[0], N])
    return like(y, x, N)


def _grad_input(grad: Any, values: Any, pattern: Any, keep: int, group: int) -> Any | None:
    if not _applies(keep, group, grad, values):
        return None
    N, K, rows = values.get_size()[0], 2 * values.get_size()[1], matrix(grad)
    dx = _product("grad_input", [rows, values, pattern], {2: _pattern(N, K)}, [rows.get_size()[0], K])
    return like(dx, grad, K)


def _grad_input_columns(grad: Any, values: Any, pattern: Any, column_mask: Any, keep: int, group: int) -> Any | None:
    N, K = values.get_size()[0], 2 * values.get_size()[1]
    if not _applies(keep, group, grad, values) or N % 4:
        return None
    rows = matrix(grad)
    inputs = [rows, values, pattern, column_mask]
    generators = {2: _pattern(N, K), 3: _column_mask(N, K)}
    dx = _product("grad_input_columns", inputs, generators, [rows.get_size()[0], K])
    return like(dx, grad, K)


def _grad_weight(grad: Any, x: Any, pattern: Any, keep: int, group: int) -> Any | None:
    N, K = grad.get_size()[-1], x.get_size()[-1]
    if not _applies(keep, group, grad, x) or K % 4:
        return None
    inputs = [matrix(grad), matrix(x), pattern]
    return _product("grad_weight", inputs, {2: _pattern(N, K)}, [N, K // 2])
