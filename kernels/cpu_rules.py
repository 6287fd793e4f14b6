"""The choice on a CPU between a 2:4 kernel, a dense product with the expanded weight, and one with a dense copy.

On a machine where ``slope-compile tune`` has run, its measurements decide.  Elsewhere a rule decides that was found by
interleaved measurements on an AVX2 and an AVX-512 machine: a 2:4 kernel is better than expanding in all but the cases
named here, if only because expanding a large weight allocates as much memory at every call.
"""

from __future__ import annotations

import torch

from slope_compile.kernels import cpu_tuning

OUTER, PACKED = 8, 32
"""Portable weight gradients use outer products for M <= OUTER and tiles for M >= PACKED; otherwise the dense
product."""


def sparse(op: str, M: int, N: int, K: int, dtype: torch.dtype, isa: str) -> bool:
    """Whether the 2:4 kernel computes ``op`` for M tokens and a weight ``[N, K]``.

    Args:
        op: "forward", "grad_input", "grad_input_columns" or "grad_weight".
        M: tokens.
        N, K: out_features and in_features.
        dtype: of activations and weight.
        isa: level of the library, see ``cpu_build``.
    """
    table = cpu_tuning.load(isa, torch.get_num_threads())
    measured = None if table is None else table.sparse(op, M, N, K, dtype)
    if measured is not None:
        return measured
    if op != "grad_weight":
        return True
    return isa != "portable" or M <= OUTER or M >= PACKED


def copied(M: int, N: int, K: int, dtype: torch.dtype, isa: str) -> bool:
    """Whether a forward product reads a copy of the dense weight, if ``dense_copies`` has one.

    It does where the machine was tuned with ``--copies`` and a copy was faster than both other ways.
    """
    table = cpu_tuning.load(isa, torch.get_num_threads())
    return table is not None and table.copied("forward", M, N, K, dtype)
