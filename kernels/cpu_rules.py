"""When the 2:4 kernels are used on a CPU, and when a dense product with the expanded weight is.

A machine on which ``slope-compile tune`` has run goes by what was measured there.  Elsewhere a rule decides, which
comes from interleaved measurements (``python -m benchmarks run --suite cpu``): in float32 and float16 a 2:4
kernel beats expanding at every M but for the weight gradient of some ten tokens.  In bfloat16 that holds where
PyTorch has no bfloat16 instructions to use; where it has (AVX512_BF16), its dense product runs at twice the rate of
float32, and the 2:4 kernels, which add up in float32, only win while they are bound by memory.
"""

from __future__ import annotations

import torch

from slope_compile.kernels import cpu_tuning

FEW_TOKENS = 16
"""Below: products bound by memory, also where the dense one has faster instructions."""
OUTER, PACKED = 8, 32
"""Weight gradients: up to the one, sums of outer products; from the other on, tiles.  In between neither wins."""


def sparse(op: str, M: int, dtype: torch.dtype, isa: str) -> bool:
    """Whether the 2:4 kernel computes ``op`` for M tokens.

    Args:
        op: "forward", "grad_input", "grad_input_columns" or "grad_weight".
        M: tokens.
        dtype: of activations and weight.
        isa: level of the library, see ``cpu_build``.
    """
    table = cpu_tuning.load(isa, torch.get_num_threads())
    measured = None if table is None else table.sparse(op, M, dtype)
    if measured is not None:
        return measured
    instructions = dtype is torch.bfloat16 and isa == "avx512_bf16"
    if op == "grad_weight":
        return M <= OUTER or (M >= PACKED and not instructions)
    return M < FEW_TOKENS or not instructions
