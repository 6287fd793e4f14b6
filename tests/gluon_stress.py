"""Stress test of the Gluon kernels on a GPU: every configuration runs many times, and its results must not differ.

``python tests/gluon_stress.py`` runs the kernels directly.  If NVIDIA's ``compute-sanitizer`` is on the path, it then
runs them under its tools: racecheck for the rings in shared memory, memcheck for accesses outside tensors, synccheck
for barriers.  If it is not, the script reports that these checks are missing.

Exit status: 0 if everything was checked and is right, 1 if something is wrong, 2 if something could not be checked.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slope_compile.kernels import gluon_configs, gluon_products, gpu_self_test, reference
from slope_compile.kernels.gluon_configs import Config, WgmmaSp
from slope_compile.kernels.metadata import pack_mask

TOOLS = ("racecheck", "memcheck", "synccheck")
CONFIGS: tuple[Config, ...] = (*gluon_configs.MMA_SP, *gluon_configs.WGMMA_SP)
DTYPES = (torch.bfloat16, torch.float16)


def sizes(config: Config) -> tuple[int, int, int, int]:
    """M, N, K and R: several tiles, partial ones among them; every stage is used often, with a rest of blocks."""
    return 2 * config.BM + 3, 2 * config.BN + 24, 64 * (3 * config.stages // 2 * 2 + 1), 72


def runs(device: torch.device, capability: tuple[int, int]) -> Iterator[tuple[str, Callable[[], Tensor], Tensor]]:
    """Name, product and expected result; the inputs are whole numbers so small that only one result is right."""
    for config in CONFIGS:
        kernel = "wgmma_sp" if isinstance(config, WgmmaSp) else "mma_sp"
        for dtype in DTYPES:
            M, N, K, R = sizes(config)
            if gluon_products.unsupported(kernel, capability, dtype, M, N, K, R) is not None:
                continue

            def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randint(-1, 2, shape, device=device).to(dtype)

            pattern = pack_mask(gpu_self_test._mask(N, K)).to(device)
            x, values, bias, t, b = draw(M, K), draw(N, K // 2), draw(N), draw(M, R), draw(N, R)
            truth = reference.forward(x.double(), values.double(), pattern, bias.double(), 2, 4)
            truth = (truth + t.double() @ b.double().t()).to(dtype)
            given = (x, values, pattern, bias, (t, b))
            yield f"{config} {dtype}", functools.partial(_product, config, given), truth
            yield f"{config} {dtype} split", functools.partial(_product, config, given, 3), truth


def _product(
    config: Config,
    given: tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]],
    splits: int | None = None,
) -> Tensor:
    if isinstance(config, WgmmaSp):
        return gluon_products.wgmma_sp(*given, config, splits)
    return gluon_products.mma_sp(*given, config, splits)


def stress(device: torch.device, rounds: int) -> list[str]:
    """Names of what went wrong.  Launches follow each other without a pause, as many at a time as there is room for."""
    wrong = []
    for name, product, truth in runs(device, torch.cuda.get_device_capability(device)):
        differing = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(rounds):
            differing += (product() != truth).any()
        count = int(differing)
        print(f"{name}: {count} of {rounds} rounds wrong", flush=True)
        wrong += [name] * bool(count)
    return wrong


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="launches of each product; 1 under the tools")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS, help="of compute-sanitizer")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return 2
    if stress(torch.device("cuda"), options.rounds):
        return 1
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None and options.tools:
        print(f"compute-sanitizer is not on the path: {', '.join(options.tools)} did not run")
        return 2
    failed = []
    for tool in options.tools:
        inside = [sys.executable, __file__, "--rounds", "1", "--tools"]
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *inside]
        if subprocess.run(command, check=False).returncode:
            failed.append(tool)
        print(f"{tool}: {'failed' if tool in failed else 'nothing found'}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
