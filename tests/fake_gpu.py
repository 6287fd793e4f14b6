"""A fake GPU for the host side of Triton: kernels are compiled for sm_90, and launches are only recorded.

``python tests/fake_gpu.py`` launches each kind of kernel on CPU tensors twice and prints both launches: the first
goes through Triton, the second through the cache of :class:`Launcher`.  It runs in its own process, because Triton has
one driver per process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from slope_compile.kernels import few_tokens, gluon_configs, gluon_products, launching, triton_products

LAUNCHED: list[list[str]] = []


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class _Launch:
    """In the place of the compiled code that launches a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        LAUNCHED.append([self.name, *map(_text, arguments)])


class _Driver:
    utils = _Utils()
    launcher_cls = _Launch

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _text(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{argument.dtype} at {argument.data_ptr()}"
    if hasattr(argument, "block_shape"):
        return f"tiles {list(argument.block_shape)} of {list(argument.shape)} at {argument.base.data_ptr()}"
    return repr(argument) if isinstance(argument, int | tuple) or argument is None else type(argument).__name__


def calls(M: int, N: int, K: int) -> dict[str, Callable[[], object]]:
    """Each kernel on one problem."""
    values, pattern = torch.zeros(N, K // 2).half(), torch.zeros(N, K // 8, dtype=torch.uint8)
    columns = torch.zeros(N, -(-K // 16), dtype=torch.uint8)
    x, grad, bias, y = (torch.zeros(*size).half() for size in ((M, K), (M, N), (N,), (M, N)))
    mma, wgmma = gluon_configs.MMA_SP[0], gluon_configs.WGMMA_SP[0]
    return {
        f"few {M}": lambda: few_tokens.forward(x[:4], values, pattern, out=y[:4]),
        f"mma_sp {M}": lambda: gluon_products.mma_sp(x, values, pattern, bias, None, mma, 1, out=y),
        f"wgmma_sp {M}": lambda: gluon_products.wgmma_sp(x, values, pattern, config=wgmma, out=y),
        f"forward {M}": lambda: triton_products.forward(x, values, pattern, bias, out=y),
        f"grad_input {M}": lambda: triton_products.grad_input(grad, values, pattern, columns, out=x),
        f"grad_weight {M}": lambda: triton_products.grad_weight(grad, x, pattern, out=values),
    }


def main() -> None:
    triton.runtime.driver.set_active(_Driver())
    launching._device = lambda arguments: 0
    report: dict[str, list[list[list[str]]]] = {}
    # Sizes that differ in what Triton compiles in.
    for name, call in (calls(1, 64, 128) | calls(40, 72, 144)).items():
        report[name] = []
        for _ in range(2):
            LAUNCHED.clear()
            call()
            report[name].append(list(LAUNCHED))
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
