"""The products on a GPU as compiled code calls them: into a given buffer and by a named way.

| way | what runs |
|---|---|
| ``triton`` | the Triton kernel, which expands a tile of the weight in registers |
| ``few`` | the Gluon kernel for up to eight tokens, bound by reading the weight |
| ``mma_sp``, ``wgmma_sp`` | a Gluon kernel on the sparse tensor cores; for input gradients, columns come first |
| ``cusparselt`` | NVIDIA's library, through PyTorch, on an operand packed for the call, where tuning verified it |
| ``expanded`` | PyTorch's dense product with the weight expanded in a scratch buffer |

With ``way=None``, ``gpu_rules`` decides at each call, when the number of tokens is known: graphs with symbolic sizes
run one piece of code for all ranges of token counts.  Activations are matrices: x ``[M, K]``, grad ``[M, N]``.
``tile`` names a configuration of a Gluon kernel, so that the autotuner can measure each; if it is empty, the default
one is used.  Operands that do not fit together go to the definition, as in the operators (``operands``).  Scratch
memory comes from PyTorch's caching allocator and nothing is read back, so that CUDA graphs can hold these calls.
Self-tests must run outside of a capture, in the warm-up; a way that was not tested before a capture is not used in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slope_compile.kernels import (
    _cusparselt,
    few_self_test,
    few_tokens,
    gluon_choices,
    gluon_configs,
    gluon_products,
    gluon_self_test,
    gpu_ops,
    gpu_rules,
    gpu_tuning,
    operands,
    reference,
    triton_products,
)
from slope_compile.kernels._replays import Operands, Replays
from slope_compile.kernels.gluon_configs import MmaSp, WgmmaSp
from slope_compile.kernels.self_tests import trusted

REPLAYED = frozenset(("triton", "few", "mma_sp", "wgmma_sp"))
"""The ways that launch kernels of this package only."""


def can(
    way: str, op: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, R: int = 0, tile: str = ""
) -> bool:
    """Whether a way can compute a product of these sizes on a device and is right there; the first use tests it.

    Args:
        R: rank of a low-rank update of the forward product; 0 without.
        tile: name of a configuration of a Gluon kernel, see :func:`tiles`; the default one without.
    """
    if way in ("triton", "expanded"):
        return True
    if M == 0 or op not in ("forward", "grad_input_columns"):
        return False  # the pattern does not run along the sum
    outputs, inputs = (N, K) if op == "forward" else (K, N)
    if way == "cusparselt":
        return _cusparselt.missing(device, dtype, M, outputs, inputs) is None
    if device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(device)
    if way == "few":
        if few_tokens.unsupported(capability, dtype, M, inputs) is not None:
            return False
        return trusted(few_self_test.passes, device, dtype, _few_config(M, inputs, tile), M)
    if gluon_products.unsupported(way, capability, dtype, M, outputs, inputs, R) is not None:
        return False
    config = _gluon_config(way, M, outputs, inputs, device, tile)
    if isinstance(config, WgmmaSp) and config.largest_rank < R:
        return False
    cases = (gluon_self_test.case(config, bias, R > 0, outputs) for bias in (True, False))
    return all(trusted(gluon_self_test.passes, device, dtype, *case) for case in cases)


def tiles(
    way: str, op: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, R: int = 0
) -> tuple[str, ...]:
    """Names of the configurations by which a way can compute a product; empty if the way has only one."""
    outputs, inputs = (N, K) if op == "forward" else (K, N)
    if way == "few":
        names = [str(config) for config in few_tokens.configurations(M, inputs)]
        return tuple(name for name in names if can(way, op, M, N, K, dtype, device, R, name))
    if way not in ("mma_sp", "wgmma_sp"):
        return ()
    kind = MmaSp if way == "mma_sp" else WgmmaSp
    found = gluon_choices.choices(M, outputs, inputs, R, device, dtype)
    return tuple(str(config) for config in found if isinstance(config, kind))


def _few_config(M: int, K: int, tile: str) -> few_tokens.FewTokens:
    found = few_tokens.configurations(M, K)
    return next(config for config in found if tile in ("", str(config)))


def _gluon_config(way: str, M: int, N: int, K: int, device: torch.device, tile: str = "") -> MmaSp | WgmmaSp:
    if tile:
        return next(c for c in (*gluon_configs.MMA_SP, *gluon_configs.WGMMA_SP) if str(c) == tile)
    if way == "mma_sp":
        return gluon_configs.default(M)
    return gluon_configs.default_wgmma(M, N, K, gluon_products.processors(device))


def possible(op: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, R: int = 0) -> tuple[str, ...]:
    """All the ways that can compute a product."""
    return tuple(way for way in gpu_rules.WAYS if can(way, op, M, N, K, dtype, device, R))


def chosen(op: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, R: int = 0) -> str:
    """The way that the rules choose among those that can compute a product; only the ways they choose are tested."""
    gpu = gpu_ops.name(device)
    left: tuple[str, ...] = gpu_rules.WAYS
    while True:
        way = gpu_rules.way(op, M, N, K, dtype, gpu, left)
        if can(way, op, M, N, K, dtype, device, R):
            return way
        left = tuple(other for other in left if other != way)


def measure(device: torch.device) -> Iterator[gpu_tuning.Entry]:
    """Every way of every product in :mod:`gpu_tuning`'s cases, compared with the dense result and timed."""
    products: dict[str, Callable[..., Tensor]] = {
        "forward": linear, "grad_input": grad_input, "grad_input_columns": grad_input_columns,
        "grad_weight": grad_weight,
    }  # fmt: skip

    def run(op: str, way: str, problem: gpu_tuning.Problem) -> Tensor:
        out = torch.empty(problem.size(op), dtype=problem.dtype, device=device)
        return products[op](*problem.arguments(op), out=out, way=way)

    return gpu_tuning.measure(device, possible, run, gpu_tuning.gpu_seconds)


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    way: str | None = None,
    tile: str = "",
) -> Tensor:
    """``out [M, N] = X W^T + bias``."""
    return _call(_linear, (x, values, pattern, bias, None, None, out), way, tile)


def linear_low_rank(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    way: str | None = None,
    tile: str = "",
) -> Tensor:
    """``out [M, N] = X W^T + bias + down up^T``, down ``[M, R]``, up ``[N, R]``."""
    return _call(_linear, (x, values, pattern, bias, down, up, out), way, tile)


def grad_input(grad: Tensor, values: Tensor, pattern: Tensor, *, out: Tensor, way: str | None = None) -> Tensor:
    """``out [M, K] = dY W``, exact.  Its sum runs along N and the pattern along K: no way on sparse tensor cores."""
    return _call(_grad_input, (grad, values, pattern, out), way)


def grad_input_columns(
    grad: Tensor,
    values: Tensor,
    pattern: Tensor,
    column_mask: Tensor,
    *,
    out: Tensor,
    way: str | None = None,
    tile: str = "",
) -> Tensor:
    """``out [M, K] = dY W^{R,C}``, double-pruned."""
    return _call(_grad_input_columns, (grad, values, pattern, column_mask, out), way, tile)


def grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, *, out: Tensor, way: str | None = None) -> Tensor:
    """``out [N, K / 2]``: ``dY^T X`` at the kept positions."""
    return _call(_grad_weight, (grad, x, pattern, out), way)


_replays = Replays()
"""Calls of all models: what is recorded depends on nothing but the kinds of their operands."""


def _call(product: Callable[..., Tensor], operands: Operands, way: str | None, *tile: str) -> Tensor:
    """By a way that is named, calls of the kernels are replayed; the ways of libraries are no launches of ours."""
    out = operands[-1]
    if way in REPLAYED and out is not None and out.is_cuda and out.dtype in gluon_products.DTYPES:
        return _replays.call(product, operands, way, *tile)
    return product(*operands, way, *tile)


def _linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    way: str | None,
    tile: str,
) -> Tensor:
    fits = operands.forward_fits(x, values, pattern, bias, down, up)
    if not gpu_ops.usable(2, 4, x, values, pattern, bias, down, up) or not fits:
        return out.copy_(reference.forward(x, values, pattern, bias, 2, 4, down, up))
    low_rank = None if down is None or up is None else (down, up)
    if way is None:
        way = _way("forward", x, values.shape[0], values.shape[1] * 2, 0 if up is None else up.shape[1])
        return _call(_linear, (x, values, pattern, bias, down, up, out), way, tile)
    if way == "triton":
        return triton_products.forward(x, values, pattern, bias, low_rank, out=out)
    if way == "expanded":
        return _dense(x, triton_products.expand(values, pattern).t(), bias, out, low_rank)
    return _sparse_operand(way, x, values, pattern, bias, out, low_rank, tile)


def _grad_input(grad: Tensor, values: Tensor, pattern: Tensor, out: Tensor, way: str | None) -> Tensor:
    if not gpu_ops.usable(2, 4, grad, values, pattern) or not operands.grad_input_fits(grad, values, pattern):
        return out.copy_(reference.grad_input(grad, values, pattern, 2, 4))
    if way is None:
        way = _way("grad_input", grad, values.shape[0], values.shape[1] * 2)
        return _call(_grad_input, (grad, values, pattern, out), way)
    if way == "triton":
        return triton_products.grad_input(grad, values, pattern, out=out)
    return _dense(grad, triton_products.expand(values, pattern), None, out)


def _grad_input_columns(
    grad: Tensor, values: Tensor, pattern: Tensor, column_mask: Tensor, out: Tensor, way: str | None, tile: str
) -> Tensor:
    fits = operands.grad_input_fits(grad, values, pattern, column_mask)
    if not gpu_ops.usable(2, 4, grad, values, pattern, column_mask) or not fits:
        return out.copy_(reference.grad_input_columns(grad, values, pattern, column_mask, 2, 4))
    if way is None:
        way = _way("grad_input_columns", grad, values.shape[0], values.shape[1] * 2)
        return _call(_grad_input_columns, (grad, values, pattern, column_mask, out), way, tile)
    if way == "triton":
        return triton_products.grad_input(grad, values, pattern, column_mask, out=out)
    if way == "expanded" or values.shape[0] % 4:  # groups of four rows need N in fours
        return _dense(grad, triton_products.expand(values, pattern, column_mask), None, out)
    column_values, column_pattern = triton_products.compress_columns(values, pattern, column_mask)  # of the transpose
    return _sparse_operand(way, grad, column_values, column_pattern, None, out, tile=tile)


def _grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, out: Tensor, way: str | None) -> Tensor:
    if not gpu_ops.usable(2, 4, grad, x, pattern) or not operands.grad_weight_fits(grad, x, pattern):
        return out.copy_(reference.grad_weight(grad, x, pattern, 2, 4))
    if way is None:
        return _call(_grad_weight, (grad, x, pattern, out), _way("grad_weight", x, grad.shape[1], x.shape[1]))
    if way == "triton":
        return triton_products.grad_weight(grad, x, pattern, out=out)
    return triton_products.compress(grad.t() @ x, pattern, out=out)


def _way(op: str, rows: Tensor, N: int, K: int, R: int = 0) -> str:
    return chosen(op, rows.shape[0], N, K, rows.dtype, rows.device, R)


def _dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, low_rank: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``x [M, A] @ weight [A, B] + bias``, and the low-rank update in a product of its own."""
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)
    return out if low_rank is None else out.addmm_(low_rank[0], low_rank[1].t())


def _sparse_operand(
    way: str,
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    out: Tensor,
    low_rank: tuple[Tensor, Tensor] | None = None,
    tile: str = "",
) -> Tensor:
    """``x W^T + bias`` by a way that reads compressed weights, or with the expanded weight where that way cannot."""
    M, N, K = x.shape[0], values.shape[0], values.shape[1] * 2
    R = 0 if low_rank is None else low_rank[1].shape[1]
    if not can(way, "forward", M, N, K, x.dtype, x.device, R, tile):
        return _dense(x, triton_products.expand(values, pattern).t(), bias, out, low_rank)
    if way == "cusparselt":  # which adds nothing to what is there
        out.copy_(_cusparselt.linear(x, values, pattern, bias))
        return out if low_rank is None else out.addmm_(low_rank[0], low_rank[1].t())
    if way == "few":
        few_tokens.forward(x, values, pattern, bias, _few_config(M, K, tile), out=out)
        return out if low_rank is None else out.addmm_(low_rank[0], low_rank[1].t())
    config = _gluon_config(way, M, N, K, x.device, tile)
    if isinstance(config, MmaSp):
        return gluon_products.mma_sp(x, values, pattern, bias, low_rank, config, out=out)
    return gluon_products.wgmma_sp(x, values, pattern, bias, low_rank, config, out=out)
