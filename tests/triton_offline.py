"""Triton kernels compiled to machine code for a GPU that is not there, and what the machine code says.

``python tests/triton_offline.py [80 90 ...]`` compiles every configuration for every architecture (or those that are
named), in every dtype, with and without aligned sizes, prints a line for each, and fails if one is not acceptable
(some ten minutes).  The suite compiles a part.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from slope_compile.kernels import triton_configs
from slope_compile.kernels.triton_configs import Config

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Architecture -> most shared memory of one block, in bytes (CUDA programming guide, compute capabilities)."""

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = ("forward", "grad_input", "grad_input_columns", "grad_weight", "expand")


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel to compile."""

    kernel: str
    config: Config
    dtype: torch.dtype
    arch: int
    aligned: bool
    """Sizes and strides are multiples of 16; else nothing is known of them and tails are masked."""

    precision: str = "ieee"

    def __str__(self) -> str:
        c = self.config
        tile = f"{c.BM}x{c.BN}x{c.BK}-w{c.warps}s{c.stages}"
        layout = "aligned" if self.aligned else "any"
        return f"{self.kernel}-{NAMES[self.dtype]}-sm{self.arch}-{tile}-{layout}-{self.precision}"


@dataclasses.dataclass(frozen=True)
class Result:
    spills: int
    """Loads and stores of local memory, where registers go that do not fit."""

    registers: int
    shared: int
    tensor_core: frozenset[str]
    """Families of tensor-core instructions: HMMA (mma.sync), HGMMA (wgmma), UTCHMMA (tcgen05)."""

    def problems(self, build: Build) -> list[str]:
        """What makes the kernel unacceptable."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_MEMORY[build.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        expected = expected_tensor_core(build)
        if expected is not None and not self.tensor_core & expected:
            found.append(f"no {' or '.join(sorted(expected))}")
        return found


def expected_tensor_core(build: Build) -> set[str] | None:
    """Instructions of which one must be there; None where there is nothing to multiply on tensor cores."""
    if build.kernel == "expand" or (build.dtype is torch.float32 and build.precision == "ieee"):
        return None
    rows = build.config.BN if build.kernel == "grad_weight" else build.config.BM
    if build.dtype is torch.float32 and build.kernel.startswith("grad_input"):
        rows = build.config.BK  # transposed
    if build.arch == 90 and rows >= 64:
        return {"HGMMA"}
    if build.arch == 100 and rows >= 64:
        return {"UTCHMMA", "HMMA"}
    return {"HMMA"}


def builds(
    archs: tuple[int, ...], dtypes: tuple[torch.dtype, ...], aligned: tuple[bool, ...] = (True, False)
) -> Iterator[Build]:
    for arch, dtype, kernel in itertools.product(archs, dtypes, KERNELS):
        for flag in aligned:
            for config in triton_configs.configurations(kernel.removesuffix("_columns"), dtype, flag):
                yield Build(kernel, config, dtype, arch, flag)
                if dtype is torch.float32 and kernel != "expand":
                    yield Build(kernel, config, dtype, arch, flag, "tf32")


def compile_offline(build: Build) -> Result:
    """Compile with the ptxas that comes with Triton and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from slope_compile.kernels import triton_kernels

    kernel = getattr(triton_kernels, build.kernel.removesuffix("_columns"))
    columns = build.kernel == "grad_input_columns"
    c = build.config
    constants: dict[str, Any] = {
        "BM": c.BM, "BN": c.BN, "BK": c.BK, "BR": 16, "HAS_BIAS": True, "HAS_LOW_RANK": True, "HAS_COLUMNS": columns,
        "EVEN": build.aligned, "TRANSPOSED": build.dtype is torch.float32, "PRECISION": build.precision, "GROUP": 8,
    }  # fmt: skip
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = (name.isupper() and len(name) > 1) or name in "XVPTBYCW"
        if pointer:
            signature[name] = "*u8" if name in ("P", "C") else f"*{NAMES[build.dtype]}"
        else:
            signature[name] = "i32"
        if pointer or build.aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    used = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    compiled = triton.compile(
        ASTSource(kernel, signature, used, attributes),
        target=GPUTarget("cuda", build.arch, 32),
        options={"num_warps": c.warps, "num_stages": c.stages},
    )
    code, usage = _disassembled(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    registers = re.search(r"REG:(\d+)", usage)
    return Result(
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        registers=int(registers.group(1)) if registers else 0,
        shared=compiled.metadata.shared,
        tensor_core=frozenset(re.findall(r"\b(UTC[A-Z]*MMA|HGMMA|HMMA)\b", code)),
    )


def _disassembled(cubin: bytes, tools: Path) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [tools / "nvdisasm", "-c", file.name], [tools / "cuobjdump", "-res-usage", file.name]
        outputs = [subprocess.run(list(map(str, c)), capture_output=True, text=True, check=True) for c in commands]
    return outputs[0].stdout, outputs[1].stdout + outputs[1].stderr


def main(archs: tuple[int, ...]) -> int:
    failed = 0
    for build in builds(archs, tuple(NAMES)):
        result = compile_offline(build)
        problems = result.problems(build)
        failed += bool(problems)
        print(f"{build}: {result.registers} registers, {result.shared} B, {sorted(result.tensor_core)} {problems}")
    print(f"{failed} not acceptable")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(tuple(map(int, sys.argv[1:])) or tuple(SHARED_MEMORY))))
