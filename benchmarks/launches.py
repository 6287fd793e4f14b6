"""One launch of each GPU kernel at a typical size, for a profiler that reads the hardware's counters:

    ncu --clock-control none -k regex:"forward|grad_weight|nvjet|gemm" --set full python -m benchmarks.launches

Each kernel is launched once beforehand.  With a warm Triton cache, nothing is then compiled under the profiler.
``--seconds`` instead repeats each kernel for that long, to watch clocks and power at the same time
(``nvidia-smi --query-gpu=clocks.sm,power.draw --format=csv -lms 100``).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.products import Problem
from slope_compile.kernels import few_tokens, gluon_products, triton_products

MANY = (16384, 4096, 4096)
FEW = (1, 14336, 4096)
"""``(M, N, K)``"""


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What can run on the device, by name."""
    for sizes in (MANY, FEW):
        for name, call in _of(Problem.draw(*sizes, "bfloat16", device, copies=1)):
            yield f"{name} {sizes}", call


def _of(problem: Problem) -> Iterator[tuple[str, Callable[[], object]]]:
    capability = torch.cuda.get_device_capability(problem.device)
    M, N, K = problem.M, problem.N, problem.K
    x, grad, weight = problem.x, problem.grad, problem.weights[0]
    values, pattern = weight.values, weight.pattern
    yield "dense", lambda: x @ weight.dense.t()
    if gluon_products.unsupported("wgmma_sp", capability, torch.bfloat16, M, N, K) is None:
        yield "wgmma_sp", lambda: gluon_products.wgmma_sp(x, values, pattern)
    if gluon_products.unsupported("mma_sp", capability, torch.bfloat16, M, N, K) is None:
        yield "mma_sp", lambda: gluon_products.mma_sp(x, values, pattern)
    yield "triton", lambda: triton_products.forward(x, values, pattern)
    if M > few_tokens.MOST:
        yield "grad_weight triton", lambda: triton_products.grad_weight(grad, x, pattern)
        yield "grad_weight dense", lambda: grad.t() @ x
    elif few_tokens.unsupported(capability, torch.bfloat16, M, K) is None:
        for config in few_tokens.configurations(M, K):
            yield str(config), functools.partial(few_tokens.forward, x, values, pattern, None, config)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Launch each GPU kernel once.")
    parser.add_argument("--seconds", type=float, default=0.0, help="repeat each for so long, and print its mean time")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: nothing to launch\n")
        return 2
    with torch.no_grad():
        for name, call in calls(torch.device("cuda", torch.cuda.current_device())):
            call()
            torch.cuda.synchronize()
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < given.seconds:
                for _ in range(20 if given.seconds else 1):
                    call()
                    count += 1
                torch.cuda.synchronize()
            mean = (time.perf_counter() - start) / count
            print(f"{name}: {1e6 * mean:.1f} us" if given.seconds else name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
