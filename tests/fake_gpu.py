"""A fake GPU for the host side of Triton: kernels are compiled for sm_90, and launches are only recorded.

``python tests/fake_gpu.py`` launches each kind of kernel on CPU tensors twice and prints both launches: the first
goes through Triton, the second through the cache of :class:`Launcher`.  Likewise it prints what products launch when
they are called and when they are replayed, with other operands.  It runs in its own process, because Triton has one
driver per process.
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

from slope_compile.kernels import (
    few_tokens,
    gluon_configs,
    gluon_products,
    gpu_calls,
    gpu_ops,
    launching,
    triton_products,
)
from slope_compile.kernels._replays import Replays

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


_NAMES: dict[int, str] = {}
"""Address -> name of an operand or of scratch memory; without names, a tensor is printed with its address."""


def _text(argument: Any) -> str:
    if isinstance(argument, Tensor):
        address = argument.data_ptr()
        return _NAMES.setdefault(address, f"scratch {len(_NAMES)}") if _NAMES else f"{argument.dtype} at {address}"
    if hasattr(argument, "block_shape"):
        return f"tiles {list(argument.block_shape)} of {list(argument.shape)} at {_text(argument.base)}"
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


def products(M: int, N: int, K: int, R: int) -> dict[str, Callable[[Replays], object]]:
    """Products as compiled code calls them, each call with new operands."""

    def called(product: Callable[..., Tensor], *settings: str, **sizes: tuple[int, ...]) -> Callable[[Replays], object]:
        def call(replays: Replays) -> object:
            bits = ("pattern", "column_mask")
            given = {n: torch.zeros(s, dtype=torch.uint8 if n in bits else torch.half) for n, s in sizes.items() if s}
            _NAMES.clear()
            _NAMES.update({tensor.data_ptr(): name for name, tensor in given.items()})
            return replays.call(product, tuple(given.get(name) for name in sizes), *settings)

        return call

    x, grad, weight = (M, K), (M, N), {"values": (N, K // 2), "pattern": (N, K // 8)}
    made: dict[str, Callable[[Replays], object]] = {}
    for way, rank in (("triton", R), ("few", 0), ("mma_sp", R), ("mma_sp", 0), ("wgmma_sp", R), ("wgmma_sp", 0)):
        low_rank: dict[str, tuple[int, ...]] = {"down": (M, rank), "up": (N, rank)} if rank else {"down": (), "up": ()}
        made[f"linear {way} {rank}"] = called(
            gpu_calls._linear, way, "", x=x, **weight, bias=(N,), **low_rank, out=grad
        )
        if way != "few" and rank:
            made[f"grad_input_columns {way}"] = called(
                gpu_calls._grad_input_columns, way, "", grad=grad, **weight, column_mask=(N, K // 16), out=x
            )
    made["grad_input triton"] = called(gpu_calls._grad_input, "triton", grad=grad, **weight, out=x)
    made["grad_weight triton"] = called(
        gpu_calls._grad_weight, "triton", grad=grad, x=x, pattern=weight["pattern"], out=weight["values"]
    )
    return made


def main() -> None:
    triton.runtime.driver.set_active(_Driver())
    launching._device = lambda arguments: 0
    gluon_products.processors = lambda device: 132  # type: ignore[assignment]
    for module, name in ((gpu_ops, "available"), (gpu_ops, "trusted"), (gpu_calls, "can")):
        setattr(module, name, lambda *_: True)
    report: dict[str, list[list[list[str]]]] = {}
    # Sizes that differ in what Triton compiles in.
    for name, call in (calls(1, 64, 128) | calls(40, 72, 144)).items():
        report[name] = []
        for _ in range(2):
            LAUNCHED.clear()
            call()
            report[name].append(list(LAUNCHED))
    split = {name: call for name, call in products(1, 64, 8192, 0).items() if name == "linear mma_sp 0"}
    for name, product in (products(8, 256, 512, 16) | {f"{name} split": call for name, call in split.items()}).items():
        replays = Replays()
        report[f"replayed {name}"] = []
        for _ in range(2):
            LAUNCHED.clear()
            product(replays)
            report[f"replayed {name}"].append(list(LAUNCHED))
        assert [type(known).__name__ for known in replays._known.values()] == ["_Calls"], name
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
