"""Suite cpu, single layers: our operators against eager and compiled dense products."""

from __future__ import annotations

from benchmarks.cases import Case, Options
from benchmarks.layers import column_case, product_case

SHAPES = ((768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 11008))
"""``(N, K)``: out_features, in_features."""
TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048)
DTYPES = ("float32", "bfloat16")
THREADS = (1, 2)


def cases(options: Options) -> list[Case]:
    shapes = ((64, 64), (64, 128)) if options.tiny else SHAPES
    tokens = (1, 16) if options.tiny else TOKENS
    found = []
    for dtype in (dtype for dtype in DTYPES if options.wants(dtype)):
        for threads in options.threads or THREADS:
            for N, K in shapes:
                found.append(column_case("layer", (N, K), dtype, threads, options.device))
                for M in tokens:
                    found.append(product_case("layer", (M, N, K), dtype, threads, options.device))
    return found
