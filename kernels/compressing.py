"""From how many tokens on a product pays for compressing its weight at every call.

A weight that is stored dense-shaped can be multiplied in two ways: compressed first, for a 2:4 kernel, or, where it is
known to be pruned, as it is, by a dense product.  Compressing reads the whole weight, which for few tokens takes longer
than the product itself.
"""

from __future__ import annotations

import torch

from slope_compile.kernels import cpu_library, cpu_products, gpu_calls, gpu_ops, triton_products
from slope_compile.pattern import Pattern

CPU_TOKENS = {torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}
"""On a CPU, measured with AVX-512: single products of 128 tokens gained 11 to 63 %; in a compiled GPT-2, whose weights
lie transposed, 128 tokens gained 6 % in float32 and lost 14 % in bfloat16, 512 tokens gained 2 % in bfloat16."""

UNMEASURED_TOKENS = 512
"""The least on other levels."""

GPU_TOKENS = 4096
"""On a GPU, estimated: compressing takes at least as long as the memory does to read the weight once and write half of
it, and what sparse products of 2048 tokens gained on an H200 is no more than that."""

SPARSE_TENSOR_CORES = ("mma_sp", "wgmma_sp", "cusparselt")
"""Ways of a GPU that compute half; the others expand the weight again."""


def least_tokens(N: int, K: int, dtype: torch.dtype, device: torch.device, nm: Pattern) -> int | None:
    """The least M for which compressing ``[N, K]`` and the forward product with it beat the dense product; None where
    none does: no kernel, or none that computes less than a dense product."""
    if nm != Pattern(2, 4):
        return None
    if device.type == "cpu" and dtype in cpu_products.CODES:
        library = cpu_library.load()
        if library is None:
            return None
        return CPU_TOKENS[dtype] if library.isa.startswith("avx512") else max(UNMEASURED_TOKENS, CPU_TOKENS[dtype])
    if device.type == "cuda" and dtype in triton_products.DTYPES and gpu_ops.available(device):
        way = gpu_calls.chosen("forward", GPU_TOKENS, N, K, dtype, device)
        return GPU_TOKENS if way in SPARSE_TENSOR_CORES else None
    return None
