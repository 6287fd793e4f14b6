"""How Inductor computes the products on a GPU: kernels that it generates around ours, libraries, or a dense product.

Where the number of tokens is a number, a product has these choices: one Triton template for each tile configuration,
and the ways of ``kernels.gpu_calls`` (Gluon kernels, cuSPARSELt, the expanded weight) as calls.  Under ``max_autotune``
Inductor measures all of them; else the table of ``slope-compile tune`` names one, or the roofline rule where nothing
was measured.  With symbolic token counts one call looks its own count up in that table (``way=None``): the ranges of
counts then are the table's, and no count recompiles anything.

The templates are the tile functions of ``kernels.triton_kernels`` with a store that Inductor extends: what follows a
product (activation, residual, cast) runs in the same kernel.  Their other gain is that a call is one launch by
Inductor's own launcher, with nothing of ours in between.  Inductor may also fuse x's producer into the forward load
when nothing else reads x and, in 16 bits, it only moves data: a copy to another layout, a gather.  (The gradient of a
weight reads x too.)  Activations and norms stay kernels of their own, because x is read once per tile of outputs and
they would be computed as often.  The products of the backward pass have no such load.

Private names used, tested on torch 2.11 and 2.13: ``torch._inductor.select_algorithm.TritonTemplate``,
``SymbolicGridFn``, ``ExternKernelChoice``, ``autotune_select_algorithm``; ``ir.ExternKernel.require_stride_order``,
``require_contiguous``, ``realize_input``, ``copy_input``, ``ir.FixedLayout``; ``virtualized.V.graph.sizevars`` and
``unaligned_buffers``; ``codegen.triton.texpr`` through the template's own hooks.  Importing this module imports
Inductor: only where a graph is compiled.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import config, ir
from torch._inductor.select_algorithm import (
    ExternKernelChoice,
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
)
from torch._inductor.virtualized import V

from slope_compile._inductor_lowerings import LEGAL_PATTERN, like, matrix, result_of
from slope_compile.kernels import cache_files, gpu_calls, gpu_ops, gpu_rules, triton_configs, triton_products
from slope_compile.kernels.triton_configs import Config

Generators = dict[int, Callable[[Any], Tensor]]
"""Index of an input -> what the autotuner fills it with."""

Bits = tuple[Any, Any, int]
"""Rows and bits a row of an input that packs them, and a legal byte of it."""

_COLUMN_MASK = 0xDB
"""The byte that the autotuner fills a column mask with.  It keeps 12 of 16 values; random weights keep 13 of 16."""

_CALLS = {
    "linear": gpu_calls.linear,
    "linear_low_rank": gpu_calls.linear_low_rank,
    "grad_input": gpu_calls.grad_input,
    "grad_input_columns": gpu_calls.grad_input_columns,
    "grad_weight": gpu_calls.grad_weight,
}

_STORE = """
    idx_m = {rows}.to(INDEX_DTYPE)[:, None]
    idx_n = {columns}.to(INDEX_DTYPE)[None, :]
    mask = (idx_m < {height}) & (idx_n < {width})
    {{{{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=({shape}))}}}}
"""

_FORWARD = """
{% if HAS_LOW_RANK and HAS_BIAS %}
{{def_kernel("X", "V", "P", "T", "B", "BIAS")}}
{% elif HAS_LOW_RANK %}
{{def_kernel("X", "V", "P", "T", "B")}}
{% elif HAS_BIAS %}
{{def_kernel("X", "V", "P", "BIAS")}}
{% else %}
{{def_kernel("X", "V", "P")}}
{% endif %}
    M = {{size("X", 0)}}
    N = {{size("V", 0)}}
    K = 2 * {{size("V", 1)}}
    pm, pn = tile_of(M, N, BM, BN, 8)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    v_at, p_at = forward_weights(V, P, rn, K, {{stride("P", 0)}}, BK, WORDS)
    in_n = (rn < N)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    tl.assume(K > 0)
    for k in range(0, K, BK):
        idx_m = rm.to(INDEX_DTYPE)[:, None]
        idx_n = (k + rk).to(INDEX_DTYPE)[None, :]
        in_x = (idx_m < M){% if not EVEN %} & (idx_n < K){% endif %}
        {{load_input("X", "x", ("idx_m", "idx_n"), mask="in_x", indent_width=8, index_shape=("BM", "BK"))}}
        acc = forward_step(acc, x, v_at, p_at, k, in_n, K, {{stride("P", 0)}}, BN, BK, EVEN, WORDS, PRECISION)
        v_at += BK // 2
        p_at += BK // (32 if WORDS else 8)
    {% if HAS_LOW_RANK %}
    R = {{size("T", 1)}}
    acc = low_rank_sums(acc, T, B, rm, rn, M, N, R, BM, BN, BR, PRECISION)
    {% endif %}
    {% if HAS_BIAS %}
    acc += tl.load(BIAS + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    {% endif %}
""" + _STORE.format(rows="rm", columns="rn", height="M", width="N", shape='"BM", "BN"')

_GRAD_INPUT = """
{% if HAS_COLUMNS %}
{{def_kernel("DY", "V", "P", "C")}}
    stride_c = {{stride("C", 0)}}
{% else %}
{{def_kernel("DY", "V", "P")}}
    C = P
    stride_c = 0
{% endif %}
    M = {{size("DY", 0)}}
    N = {{size("V", 0)}}
    K = 2 * {{size("V", 1)}}
    pm, pk = tile_of(M, K, BM, BK, 8)
    rm = pm * BM + tl.arange(0, BM)
    rk = pk * BK + tl.arange(0, BK)
    acc = grad_input_sums(
        DY, V, P, C, rm, pk, M, N, K, {{stride("DY", 0)}}, {{stride("P", 0)}}, stride_c,
        BM, BN, BK, HAS_COLUMNS, EVEN, WORDS, COLUMN_WORDS, TRANSPOSED, PRECISION
    )
""" + _STORE.format(rows="rm", columns="rk", height="M", width="K", shape='"BM", "BK"')

_GRAD_WEIGHT = """
{{def_kernel("DY", "X", "P")}}
    M = {{size("X", 0)}}
    N = {{size("DY", 1)}}
    K = {{size("X", 1)}}
    pn, pk = tile_of(N, K, BN, BK, 8)
    rn = pn * BN + tl.arange(0, BN)
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    # Rounded here, where the kept entries are picked; the store rounds nothing more.
    acc = grad_weight_kept(
        DY, X, P, pn, pk, M, N, K, {{stride("DY", 0)}}, {{stride("X", 0)}}, {{stride("P", 0)}},
        X.dtype.element_ty, BM, BN, BK, EVEN, PRECISION
    ).to(tl.float32)
""" + _STORE.format(rows="rn", columns="rv", height="N", width="K // 2", shape='"BN", "BK // 2"')


@SymbolicGridFn
def _grid_forward(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    return cdiv(m, meta["BM"]) * cdiv(n, meta["BN"]), 1, 1


@SymbolicGridFn
def _grid_grad_input(m: Any, k: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    return cdiv(m, meta["BM"]) * cdiv(k, meta["BK"]), 1, 1


@SymbolicGridFn
def _grid_grad_weight(n: Any, half: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    return cdiv(n, meta["BN"]) * cdiv(half, meta["BK"] // 2), 1, 1


@functools.cache
def _templates() -> dict[str, TritonTemplate]:
    """Each product's template; the tile functions stand below the kernel, as text, so that the code needs no import."""
    from slope_compile.kernels import triton_kernels, triton_tiles

    tiles = (triton_tiles.tile_of, triton_tiles.nibbles, triton_tiles.expanded)
    columns = (triton_tiles.flags, triton_tiles.staying)
    steps = (triton_kernels.forward_weights, triton_kernels.forward_step)
    picking = (triton_tiles.elements, triton_tiles.kept)
    parts: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
        "forward": (_grid_forward, _FORWARD, (*tiles, *steps, triton_kernels.low_rank_sums)),
        "grad_input": (_grid_grad_input, _GRAD_INPUT, (*tiles, *columns, triton_kernels.grad_input_sums)),
        "grad_weight": (_grid_grad_weight, _GRAD_WEIGHT, (*tiles, *picking, triton_kernels.grad_weight_kept)),
    }
    return {
        name: TritonTemplate(name=f"slope_{name}", grid=grid, source=text + _source(functions))
        for name, (grid, text, functions) in parts.items()
    }


def _source(functions: Sequence[Any]) -> str:
    return "".join(f"\n\n{inspect.getsource(function.fn)}" for function in functions)


@functools.cache
def kernels(version: str) -> dict[str, ExternKernelChoice]:
    """Each call under the name that generated code has for it, whether this process or another generated it."""
    ways = ("", *gpu_rules.WAYS)
    return {
        f"{name}.{way}": ExternKernelChoice(call, name=f"slope_gpu_{name}_{version}{'_' if way else ''}{way}")
        for name, call in _CALLS.items()
        for way in ways
    }


@functools.cache
def _sources() -> str:
    """Digest of the files that decide what generated code is: it is part of the keys of Inductor's caches."""
    folder = Path(gpu_calls.__file__).parent
    files = [path for kind in ("triton", "gluon", "gpu", "few") for path in folder.glob(f"{kind}_*.py")]
    files.append(Path(__file__))
    return cache_files.digest(files)[:16]


def fingerprint() -> str:
    """A text that changes with everything beside the graph that decides how it is lowered for the GPUs of this machine.

    It is empty without a GPU.
    """
    if not torch.cuda.is_available():
        return ""
    names = sorted({gpu_ops.name(torch.device("cuda", index)) for index in range(torch.cuda.device_count())})
    return "-".join([_sources(), *(gpu_rules.fingerprint(name) for name in names), triton_products.precision()])


class Lowerings:
    """The lowerings for one version of the kernels' names."""

    def __init__(self, version: str) -> None:
        self.calls = kernels(version)

    def linear(
        self,
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
        (N, half), rows = values.get_size(), _rows(x)
        low_rank = [] if down is None else _whole(matrix(down), up)
        inputs = [rows, *_whole(values, pattern), *low_rank, *([] if bias is None else _whole(bias))]
        flags: dict[str, int] = {"HAS_BIAS": bias is not None, "HAS_LOW_RANK": bool(low_rank)}
        if low_rank:
            flags["BR"] = 16 if V.graph.sizevars.statically_known_leq(up.get_size()[1], 16) else 32
        name = "linear_low_rank" if low_rank else "linear"
        masks = {2: (N, 2 * half, LEGAL_PATTERN)}
        y = self._product(name, "forward", inputs, masks, [rows.get_size()[0], N], flags, 2 * half)
        return like(y, x, N)

    def grad_input(self, grad: Any, values: Any, pattern: Any, keep: int, group: int) -> Any | None:
        if not _applies(keep, group, grad, values):
            return None
        return self._grad_input("grad_input", grad, values, [pattern])

    def grad_input_columns(
        self, grad: Any, values: Any, pattern: Any, column_mask: Any, keep: int, group: int
    ) -> Any | None:
        if not _applies(keep, group, grad, values):
            return None
        return self._grad_input("grad_input_columns", grad, values, [pattern, column_mask])

    def _grad_input(self, name: str, grad: Any, values: Any, bits: list[Any]) -> Any:
        (N, half), rows = values.get_size(), _rows(grad)
        K = 2 * half
        flags = {"HAS_COLUMNS": len(bits) > 1, "TRANSPOSED": grad.get_dtype() is torch.float32}
        masks = {2: (N, K, LEGAL_PATTERN)} | ({3: (N, half, _COLUMN_MASK)} if len(bits) > 1 else {})
        inputs = [rows, *_whole(values, *bits)]
        dx = self._product(name, "grad_input", inputs, masks, [rows.get_size()[0], K], flags, N)
        return like(dx, grad, K)

    def grad_weight(self, grad: Any, x: Any, pattern: Any, keep: int, group: int) -> Any | None:
        N, K = grad.get_size()[-1], x.get_size()[-1]
        if not _applies(keep, group, grad, x) or K % 4:
            return None
        rows = _rows(grad)
        inputs = [rows, _rows(x), *_whole(pattern)]
        masks = {2: (N, K, LEGAL_PATTERN)}
        return self._product("grad_weight", "grad_weight", inputs, masks, [N, K // 2], {}, rows.get_size()[0])

    def _product(
        self,
        name: str,
        kernel: str,
        inputs: list[Any],
        masks: dict[int, Bits],
        sizes: list[Any],
        flags: Mapping[str, int],
        reduced: Any,
    ) -> Any:
        """One product of matrices ``inputs`` into a new ``[sizes]`` of the first one's dtype.

        Args:
            name: of the operator.
            kernel: of the template.
            masks: index of an input that is a pattern or a column mask -> what it packs.
            reduced: length of the reduction.
        """
        rows = inputs[0]
        layout = ir.FixedLayout(rows.get_device(), rows.get_dtype(), sizes)
        op = "forward" if name.startswith("linear") else name
        R = inputs[4].get_size()[1] if name == "linear_low_rank" else 0
        N, K = _weight_sizes(op, inputs, sizes)
        M = rows.get_size()[0]
        generators: Generators = {i: functools.partial(_legal_bits, *mask) for i, mask in masks.items()}
        choices: list[Any] = []
        if not all(isinstance(size, int | sympy.Integer) for size in (M, N, K, R)):
            choices.append(self.calls[f"{name}."].bind(inputs, layout))
            return _selected(name, choices, inputs, layout, generators)
        dtype, device = rows.get_dtype(), rows.get_device()
        case = (op, int(M), int(N), int(K), dtype, device, int(R))
        autotune = config.max_autotune or config.max_autotune_gemm
        ways = gpu_calls.possible(*case) if autotune else (gpu_calls.chosen(*case),)
        if "triton" in ways and int(M) > 0:
            aligned = int(N) % 16 == 0 and int(K) % 128 == 0 and _strides_divide(inputs, masks, 16)
            for tile in _tiles(kernel, int(M), dtype, aligned, device, autotune):
                _templates()[kernel].maybe_append_choice(
                    choices, input_nodes=tuple(inputs), layout=layout, num_stages=tile.stages, num_warps=tile.warps,
                    **flags, **_constants(kernel, tile, int(K), int(reduced), inputs),
                )  # fmt: skip
        others = [way for way in ways if way != "triton"] if choices else list(ways)
        for way in others:
            bind = functools.partial(self.calls[f"{name}.{way}"].bind, inputs, layout, way=way)
            named = gpu_calls.tiles(way, *case) if autotune else ()
            choices += [bind(tile=tile) for tile in named] or [bind()]
        return _selected(name, choices, inputs, layout, generators)


def _tiles(kernel: str, M: int, dtype: torch.dtype, aligned: bool, device: Any, autotune: bool) -> Sequence[Config]:
    """All configurations of a kernel for something to measure, else the one taken without."""
    arch = triton_products.arch(device)
    if autotune:
        return triton_configs.configurations(kernel, dtype, aligned, arch)
    return (triton_configs.default(kernel, M, dtype, aligned, arch),)


def _constants(kernel: str, tile: Config, K: int, reduced: int, inputs: list[Any]) -> dict[str, Any]:
    """The constants that a template is compiled with."""
    block = {"forward": tile.BK, "grad_input": tile.BN, "grad_weight": tile.BM}[kernel]
    even = reduced % block == 0
    constants = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "EVEN": even, "PRECISION": _precision()}
    if kernel != "grad_weight":
        constants["WORDS"] = _words(inputs[2], K, tile.BK)
    if kernel == "grad_input":
        constants["COLUMN_WORDS"] = len(inputs) > 3 and _words(inputs[3], K // 2, tile.BK // 2)
    return constants


def _words(bits: Any, row: int, width: int) -> bool:
    """Whether a pattern or a column mask can be loaded in whole words by tiles that are ``width`` bits wide.

    Inductor does not align an input that was not aligned when the graph was compiled.
    """
    begins = bits.get_name() not in V.graph.unaligned_buffers and _offset_divides(bits, 4)
    return begins and row % 32 == 0 and width % 32 == 0


def _selected(name: str, choices: list[Any], inputs: list[Any], layout: Any, generators: Generators) -> Any:
    return result_of(
        autotune_select_algorithm(f"slope_gpu_{name}", choices, inputs, layout, input_gen_fns=generators)
    )


def _weight_sizes(op: str, inputs: list[Any], sizes: list[Any]) -> tuple[Any, Any]:
    if op == "grad_weight":
        return sizes[0], 2 * sizes[1]
    N, half = inputs[1].get_size()
    return N, 2 * half


def _precision() -> str:
    return f'"{triton_products.precision()}"'


def _legal_bits(rows: Any, bits: Any, byte: int, node: Any) -> Tensor:
    size = (int(rows), (int(bits) + 7) // 8)
    return torch.full(size, byte, dtype=torch.uint8, device=node.get_device())


def _applies(keep: int, group: int, *tensors: Any) -> bool:
    """Whether the kernels apply: see ``gpu_ops.usable``."""
    present = [tensor for tensor in tensors if tensor is not None]
    dtypes = {tensor.get_dtype() for tensor in present}
    devices = {tensor.get_device() for tensor in present}
    return (
        (keep, group) == (2, 4)
        and len(dtypes) == len(devices) == 1
        and dtypes <= set(triton_products.DTYPES)
        and all(tensor.get_size()[-1] != 0 for tensor in present)
        and gpu_ops.ready(next(iter(devices)), next(iter(dtypes)))
    )


def _rows(x: Any) -> Any:
    """``[..., features]`` as ``[M, features]`` in memory, the features of a token side by side."""
    rows = ir.ExternKernel.realize_input(matrix(x))
    rows = ir.ExternKernel.require_stride_order(rows, [1, 0])
    return rows if rows.get_stride()[-1] == 1 else ir.ExternKernel.copy_input(rows)


def _whole(*tensors: Any) -> list[Any]:
    return [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(tensor)) for tensor in tensors]


def _strides_divide(inputs: list[Any], masks: dict[int, Any], by: int) -> bool:
    """Whether each row of the activations begins at a multiple of ``by`` elements."""
    activations = [node for index, node in enumerate(inputs) if index not in masks and len(node.get_size()) == 2]
    strides = [node.get_stride()[0] for node in activations]
    known = all(isinstance(stride, int | sympy.Integer) and stride % by == 0 for stride in strides)
    return known and all(_offset_divides(node, by) for node in activations)


def _offset_divides(node: Any, by: int) -> bool:
    offset = node.get_layout().offset
    return isinstance(offset, int | sympy.Integer) and offset % by == 0
