"""The Gluon kernel for few tokens compiled to machine code without a GPU, and checks of the machine code.

``python tests/few_offline.py [80 90 ...]`` compiles every configuration for the named architectures (all by default),
in both dtypes, with and without rows that begin at multiples of 16 bytes.  It prints a line for each and fails if one
is not acceptable.  The suite compiles a part.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from slope_compile.kernels import few_tokens, gluon_products
from slope_compile.kernels.few_tokens import FewTokens
from triton_offline import NAMES, SHARED_MEMORY, _disassembled, script


@dataclasses.dataclass(frozen=True)
class Build:
    """One way to compile the kernel."""

    tokens: int
    config: FewTokens
    dtype: torch.dtype
    arch: int
    aligned: bool = True
    """Sizes and strides are multiples of 16; else nothing is known of them."""
    bias: bool = True

    def __str__(self) -> str:
        kind = "aligned" if self.aligned else "any"
        return f"{self.config}-m{self.tokens}-{NAMES[self.dtype]}-sm{self.arch}-{kind}{'' if self.bias else '-no_bias'}"

    def constants(self) -> dict[str, Any]:
        c = self.config
        return {
            "TOKENS": self.tokens, "ROWS": c.ROWS, "EACH": c.EACH, "WN": c.WN, "WK": c.WK,
            "FP16": self.dtype is torch.float16, "HAS_BIAS": self.bias,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    spills: int
    """Loads and stores of local memory, where registers go that do not fit."""
    registers: int
    shared: int
    wide: int
    """Loads of 16 bytes from global memory."""
    narrow: int
    """Of 8 bytes or fewer."""
    flushing: int = 0
    """Instructions that take subnormal numbers for zeros."""

    def problems(self, build: Build) -> list[str]:
        """What makes the kernel unacceptable."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_MEMORY[build.arch] // 8:
            found.append(f"{self.shared} bytes of shared memory: too few programs fit a multiprocessor")
        if self.flushing:
            found.append(f"{self.flushing} instructions flush subnormal numbers")
        # Values and tokens in pieces of 16 bytes; the pattern is one word of each row and lane.
        if build.aligned and not self.wide:
            found.append("no load is 16 bytes wide")
        return found


def builds(archs: tuple[int, ...]) -> Iterator[Build]:
    both = (True, False)
    for arch, dtype, aligned, bias in itertools.product(archs, gluon_products.DTYPES, both, both):
        for tokens, configs in few_tokens.CONFIGS.items():
            for config in configs:
                yield Build(tokens, config, dtype, arch, aligned, bias)


def compile_offline(build: Build) -> Result:
    """Compile with the ptxas that comes with Triton and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from slope_compile.kernels import gluon_few_tokens

    kernel, constants = gluon_few_tokens.forward, build.constants()
    word = "*i16" if build.config.EACH == 4 else "*i32"
    element = f"*{NAMES[build.dtype]}"
    types = {"X": "*i64", "V": "*i32", "P": word, "BIAS": element, "Y": element}
    known = {"X", "V", "P", "BIAS", "Y"} | ({"N", "groups", "stride_x", "stride_p"} if build.aligned else set())
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    positions = [(i,) for i, name in enumerate(kernel.arg_names) if name in known]
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constants, {at: [["tt.divisibility", 16]] for at in positions}),
        target=GPUTarget("cuda", build.arch, 32),
        options={"num_warps": build.config.warps},
    )
    code, usage = _disassembled(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    registers = re.search(r"REG:(\d+)", usage)
    loads = re.findall(r"\bLDG\.E(\S*)", code)
    return Result(
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        registers=int(registers.group(1)) if registers else 0,
        shared=compiled.metadata.shared,
        wide=sum(".128" in load for load in loads),
        narrow=sum(".128" not in load for load in loads),
        flushing=len(re.findall(r"\.FTZ\b", code)),
    )


def describe(result: Result) -> str:
    loads = f"{result.wide} loads of 16 bytes, {result.narrow} others"
    return f"{result.registers} registers, {result.shared} B, {loads}"


if __name__ == "__main__":
    sys.exit(script(builds, compile_offline, describe))
