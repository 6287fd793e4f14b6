"""Which kernel would compute each product of a layer on a device, by the rules that the operators use."""

from __future__ import annotations

import torch

from slope_compile.kernels import cpu_library, cpu_products, cpu_rules, gpu_calls, gpu_ops, triton_products
from slope_compile.pattern import Pattern

DENSE = "dense"
EXPANDED = "dense with expanded weight"
PRUNED = "dense with pruned weight"
"""For a drop-in model without gradients and with few tokens: see ``passes.sparsify``."""
OR_COPY = ", or while the weight does not change dense with a copy of it"
"""Added on a machine that was tuned with copies, where those are faster."""
_NAMES = {
    "triton": "Triton", "few": "Gluon for few tokens", "mma_sp": "Gluon mma.sp", "wgmma_sp": "Gluon wgmma.sp",
    "cusparselt": "cuSPARSELt",
}  # fmt: skip


def lowering(op: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, nm: Pattern) -> str:
    """The kernel that runs for ``op`` of a sparse layer: a 2:4 kernel, or a dense product with the expanded weight.

    Args:
        op: "forward", "grad_input", "grad_input_columns" or "grad_weight".
    """
    if nm != Pattern(2, 4):
        return EXPANDED
    if device.type == "cpu" and dtype in cpu_products.CODES:
        library = cpu_library.load()
        if library is not None:
            way = f"2:4 kernel, {library.isa}" if cpu_rules.sparse(op, M, N, K, dtype, library.isa) else EXPANDED
            return way + OR_COPY if op == "forward" and cpu_rules.copied(M, N, K, dtype, library.isa) else way
    if device.type == "cuda" and dtype in triton_products.DTYPES and gpu_ops.available(device):
        way = gpu_calls.chosen(op, M, N, K, dtype, device)
        if way != "expanded":
            return f"2:4 kernel, {_NAMES[way]}"
    return EXPANDED
