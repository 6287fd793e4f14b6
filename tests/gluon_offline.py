"""The Gluon kernels compiled to machine code for a GPU that is not there, and what the machine code says.

``python tests/gluon_offline.py [80 90 ...]`` compiles every configuration for every architecture (or those that are
named), in both dtypes, with and without aligned sizes, whole and split, prints a line for each, and fails if one is
not acceptable (some minutes).  The suite compiles a part.
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

from slope_compile.kernels import gluon_configs
from slope_compile.kernels.gluon_configs import MmaSp
from triton_offline import NAMES, SHARED_MEMORY, _disassembled


@dataclasses.dataclass(frozen=True)
class Build:
    """The ``mma.sp`` product, one way to compile it; without a configuration, the kernel that adds up its parts."""

    config: MmaSp | None
    dtype: torch.dtype
    arch: int
    aligned: bool
    """Sizes and strides are multiples of 16; else nothing is known of them, and the pattern is read by the byte."""
    split: bool = False
    ones: bool = False
    """M, N and the number of blocks are 1, which Triton compiles in as constants."""

    def __str__(self) -> str:
        c = self.config
        tile = "add_up" if c is None else f"{c.BM}x{c.BN}-w{c.WN}x{c.WM}s{c.stages}"
        kinds = ["aligned" if self.aligned else "any", *["split"] * self.split, *["ones"] * self.ones]
        return f"mma_sp-{NAMES[self.dtype]}-sm{self.arch}-{tile}-{'-'.join(kinds)}"


@dataclasses.dataclass(frozen=True)
class Result:
    spills: int
    """Loads and stores of local memory, where registers go that do not fit."""
    registers: int
    shared: int
    sparse: int
    """Instructions of the sparse tensor core, of the right dtype."""
    other: int
    """Of any other tensor core."""
    copies: int
    """Asynchronous copies in the PTX."""
    unfilled: int
    """Those of them that name no source size: masked, they would leave shared memory as it was."""
    narrow: int
    """Those of them that are shorter than 16 bytes."""
    ldmatrix: int
    """``ldmatrix`` instructions of four matrices in the machine code."""
    loop: int
    """Instructions of the main loop, for the report."""

    def problems(self, build: Build) -> list[str]:
        """What makes the kernel unacceptable."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_MEMORY[build.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if build.config is not None:
            if self.sparse != 2 * build.config.MT * build.config.NT:
                found.append(f"{self.sparse} sparse instructions")
            if self.other:
                found.append(f"{self.other} dense instructions")
            if not self.copies or self.unfilled:
                found.append(f"{self.unfilled} of {self.copies} copies fill nothing in")
            if build.aligned and self.narrow:
                found.append(f"{self.narrow} of {self.copies} copies are short")
            # For both steps of a block: A takes two for 16 rows, B two for 8 tokens.
            if self.ldmatrix != 2 * (build.config.MT + build.config.NT):
                found.append(f"{self.ldmatrix} ldmatrix")
        return found


def builds(archs: tuple[int, ...]) -> Iterator[Build]:
    for arch, dtype in itertools.product(archs, (torch.bfloat16, torch.float16)):
        for config, aligned, split in itertools.product(gluon_configs.MMA_SP, (True, False), (False, True)):
            yield Build(config, dtype, arch, aligned, split)
        yield Build(gluon_configs.MMA_SP[0], dtype, arch, aligned=False, ones=True)
        yield Build(None, dtype, arch, aligned=False)


def compile_offline(build: Build) -> Result:
    """Compile with the ptxas that comes with Triton and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from slope_compile.kernels import gluon_mma_sp

    c = build.config
    kernel = gluon_mma_sp.add_up if c is None else gluon_mma_sp.forward
    constants: dict[str, Any] = {"HAS_BIAS": not build.split}
    if c is None:
        constants |= {"BLOCK": 512}
    else:
        constants |= {"MT": c.MT, "WN": c.WN, "NT": c.NT, "WM": c.WM, "STAGES": c.stages, "BAND": 8}
        constants |= {"FP16": build.dtype is torch.float16, "HALVES": build.aligned}
    if build.ones:
        constants |= {"M": 1, "N": 1, "blocks_per_split": 1, "stride_p": 1}
    element = f"*{NAMES[build.dtype]}"
    pointers = {"X": "*i32", "V": "*i32", "P": "*i16" if build.aligned else "*u8", "BIAS": element, "PARTS": "*fp32"}
    pointers["Y"] = "*fp32" if build.split else element
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name, "i32")
        if (build.aligned and name not in ("M", "blocks_per_split", "stride_p")) or name == "Y":
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", build.arch, 32),
        options={"num_warps": 4 if c is None else c.warps},
    )
    code, usage = _disassembled(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    sparse = r"\bHMMA\.SP\.16832\.F32" + (r"\.BF16\b" if build.dtype is torch.bfloat16 else r"\s")
    tensor = len(re.findall(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA)\b", code))
    found = len(re.findall(sparse, code))
    copies = re.findall(r"cp\.async\.c[ag]\.shared[^;]*;", compiled.asm["ptx"])
    registers = re.search(r"REG:(\d+)", usage)
    return Result(
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        registers=int(registers.group(1)) if registers else 0,
        shared=compiled.metadata.shared,
        sparse=found,
        other=tensor - found,
        copies=len(copies),
        unfilled=sum(copy.count(",") < 3 for copy in copies),
        narrow=sum(not re.search(r",\s*(0x10|16)\s*,", copy) for copy in copies),
        ldmatrix=len(re.findall(r"\bLDSM\.16\.M88\.4\b", code)),
        loop=_loop(code),
    )


def _loop(code: str) -> int:
    """Instructions between the label of the loop with the tensor core's work and its branch back."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    longest = 0
    for position, line in enumerate(lines):
        label = re.match(r"^\.(L_x_\d+):", line)
        if label:
            labels[label.group(1)] = position
        back = re.search(r"\bBRA\b.*\(\.(L_x_\d+)\)", line)
        if back and back.group(1) in labels:
            body = "\n".join(lines[labels[back.group(1)] : position + 1])
            if "HMMA" in body:
                longest = max(longest, len(re.findall(r"/\*[0-9a-f]{4,}\*/", body)))
    return longest


def main(archs: tuple[int, ...]) -> int:
    failed = 0
    for build in builds(archs):
        result = compile_offline(build)
        problems = result.problems(build)
        failed += bool(problems)
        found = f"{result.registers} registers, {result.shared} B, loop {result.loop} with {result.sparse} HMMA.SP"
        print(f"{build}: {found} {problems}", flush=True)
    print(f"{failed} not acceptable")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(tuple(map(int, sys.argv[1:])) or tuple(SHARED_MEMORY))))
