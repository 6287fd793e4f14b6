"""The token count from which compressing a weight at every call pays off.

A pruned weight that is stored dense can be multiplied in two ways: compressed first, for a 2:4 kernel, or directly, by
a dense product.  Compressing reads the whole weight, which takes longer than the product itself if there are few
tokens.
"""

from __future__ import annotations

import torch

from slope_compile.kernels import cpu_library, cpu_products, gpu_calls, gpu_ops, triton_products
from slope_compile.pattern import Pattern

CPU_TOKENS = {torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}
"""The count on a CPU, measured with AVX-512.  Single products of 128 tokens gained 11 to 63 %.  In a compiled GPT-2,
whose weights are stored transposed, 128 tokens gained 6 % in float32 and lost 14 % in bfloat16; 512 tokens gained 2 %
in bfloat16."""

UNMEASURED_TOKENS = 512
"""The least count on other instruction-set levels."""

GPU_TOKENS = 4096
"""The count on a GPU, estimated.  Compressing takes at least the memory's time to read the weight once and to write
half of it, and sparse products of 2048 tokens gained no more than that on an H200."""

SPARSE_TENSOR_CORES = ("mma_sp", "wgmma_sp", "cusparselt")
"""GPU kernels that do half of the multiplications; the others expand the weight again."""


def least_tokens(N: int, K: int, dtype: torch.dtype, device: torch.device, nm: Pattern) -> int | None:
    """The smallest M for which compressing ``[N, K]`` and a forward product with it beat the dense product.

    None if there is none: there is no kernel, or no kernel does fewer multiplications than a dense product.
    """
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
