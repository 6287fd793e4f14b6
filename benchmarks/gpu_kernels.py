"""Suite kernels: our operators against cuBLAS as ``torch.compile`` in max-autotune mode picks it.

Written for a GPU.  It runs on a CPU too, where only ``--tiny`` makes sense: that is how its code is tested.
"""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case, Options
from benchmarks.layers import column_case, product_case

HIDDEN = (768, 1024, 2048, 2560, 4096, 5120, 8192)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
DTYPES = ("bfloat16", "float16")


def cases(options: Options) -> list[Case]:
    hidden = (64,) if options.tiny else HIDDEN
    tokens = (1, 16) if options.tiny else TOKENS
    shapes = [shape for d in hidden for shape in ((d, d), (4 * d, d), (d, 4 * d))]
    # Without CUDA graphs: a graph's copies of its inputs would be timed with the dense products.
    compiled: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if options.device.type == "cuda" else {}
    threads = options.threads[0] if options.threads else 1
    found = []
    for dtype in (dtype for dtype in DTYPES if options.wants(dtype)):
        for N, K in shapes:
            found.append(column_case("kernels", (N, K), dtype, threads, options.device))
            for M in tokens:
                found.append(product_case("kernels", (M, N, K), dtype, threads, options.device, compiled))
    return found
