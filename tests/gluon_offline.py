"""The Gluon kernels compiled to machine code without a GPU, and checks of the machine code.

``python tests/gluon_offline.py [80 90 ...]`` compiles every configuration for the named architectures (all by default),
in both dtypes and with every combination of flags that a launch may use.  It prints a line for each and fails if one is
not acceptable (some ten minutes).  The suite compiles a part.
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

from slope_compile.kernels import gluon_builds, gluon_configs
from slope_compile.kernels.gluon_configs import MmaSp, WgmmaSp
from triton_offline import NAMES, SHARED_MEMORY, _disassembled, script


@dataclasses.dataclass(frozen=True)
class Build:
    """One way to compile a product; without a configuration, the kernel that adds up the parts of ``mma.sp``."""

    config: MmaSp | WgmmaSp | None
    dtype: torch.dtype
    arch: int
    aligned: bool
    """``mma.sp``: sizes and strides are multiples of 16; otherwise they are arbitrary, and the pattern is read by the
    byte (or ``halves``).  ``wgmma.sp``: N is a multiple of 8."""
    split: bool = False
    ones: bool = False
    """M, N and the number of blocks are 1, and Triton makes them compile-time constants; ``mma.sp`` only."""
    low_rank: bool = False
    bias: bool = True
    halves: bool = False
    """The pattern is read by 16 bits."""

    @property
    def piece(self) -> int:
        """Bytes of the integers that a pattern is given in."""
        if isinstance(self.config, WgmmaSp):
            return 8 if self.config.staged and not self.halves else 2
        return 2 if self.halves else 8 if self.aligned else 1

    def __str__(self) -> str:
        c = self.config
        tile = "add_up" if c is None else f"{c}_s{c.stages}"
        flags = {"split": self.split, "ones": self.ones, "low_rank": self.low_rank, "no_bias": not self.bias}
        flags["halves"] = self.halves
        kinds = ["aligned" if self.aligned else "any", *(name for name, on in flags.items() if on)]
        return f"{tile}-{NAMES[self.dtype]}-sm{self.arch}-{'-'.join(kinds)}"

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of a launch."""
        c = self.config
        found: dict[str, Any] = {"HAS_BIAS": self.bias and not self.split}
        if c is None:
            return found | {"BLOCK": 512}
        found |= {"MT": c.MT, "WN": c.WN, "NT": c.NT, "STAGES": c.stages, "BAND": 8}
        found |= {"FP16": self.dtype is torch.float16, "HAS_LOW_RANK": self.low_rank}
        if isinstance(c, WgmmaSp):
            return found | {"WIDE": self.aligned, "PIECE": self.piece}
        if self.ones:
            found |= {"M": 1, "N": 1, "blocks_per_split": 1, "stride_p": 1}
        return found | {"WM": c.WM, "PIECE": self.piece}


@dataclasses.dataclass(frozen=True)
class Result:
    spills: int
    """Loads and stores of local memory, to which registers are spilled."""
    registers: int
    shared: int
    sparse: int
    """Instructions of the sparse tensor core with the right dtype."""
    dense: int
    """All other tensor-core instructions."""
    copies: int
    """Asynchronous copies in the PTX: ``cp.async`` and TMA."""
    unfilled: int
    """``cp.async`` without a source size: where masked, they would leave shared memory unchanged."""
    narrow: int
    """``cp.async`` of less than 16 bytes."""
    ldmatrix: int
    """``ldmatrix`` instructions of four matrices in the machine code."""
    in_flight: int
    """Waits for groups of ``wgmma`` that leave one in flight."""
    loop: int
    """Instructions of the main loop, for the report."""
    build: tuple[str, ...] = ()
    """Problems that ``gluon_builds`` reports."""

    def problems(self, build: Build) -> list[str]:
        """Reasons why the kernel is unacceptable; empty if it is acceptable."""
        found = list(self.build)
        c = build.config
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_MEMORY[build.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if isinstance(c, MmaSp):
            found += self._of_mma_sp(build, c)
        if isinstance(c, WgmmaSp):
            found += self._of_wgmma_sp(build, c)
        return found

    def _of_mma_sp(self, build: Build, c: MmaSp) -> list[str]:
        found = []
        if self.sparse != 2 * c.MT * c.NT:
            found.append(f"{self.sparse} sparse instructions")
        if self.dense != 2 * c.MT * c.NT * build.low_rank:
            found.append(f"{self.dense} dense instructions")
        if not self.copies or self.unfilled:
            found.append(f"{self.unfilled} of {self.copies} copies fill nothing in")
        # Copies of the pattern are short: there is one before the loop, unrolled or not, and one in the loop.
        if build.aligned and self.narrow not in ((2, c.stages) if build.piece == 8 else (0,)):
            found.append(f"{self.narrow} of {self.copies} copies are short")
        # Both steps of a block together need two for every 16 rows of A and two for every 8 tokens of B.
        if self.ldmatrix != 2 * (c.MT + c.NT):
            found.append(f"{self.ldmatrix} ldmatrix")
        return found

    def _of_wgmma_sp(self, build: Build, c: WgmmaSp) -> list[str]:
        found = []
        # The loop holds two blocks of two steps each; the low-rank update has four steps.
        if self.sparse != 4 * c.MT:
            found.append(f"{self.sparse} sparse instructions")
        if self.dense != 4 * c.MT * build.low_rank:
            found.append(f"{self.dense} dense instructions")
        of_pattern = (c.stages + 1) * (build.piece == 8)
        if self.copies != 2 * (c.stages + 2) + c.stages * build.low_rank + of_pattern or self.unfilled:
            found.append(f"{self.copies} copies")
        if self.ldmatrix != 4 * c.MT:
            found.append(f"{self.ldmatrix} ldmatrix")
        if self.in_flight != 2:
            found.append(f"{self.in_flight} waits leave a group under way")
        return found


def builds(archs: tuple[int, ...]) -> Iterator[Build]:
    both = (True, False)
    for arch, dtype in itertools.product(archs, (torch.bfloat16, torch.float16)):
        for mma, aligned in itertools.product(gluon_configs.MMA_SP, both):
            for split, low_rank in ((False, False), (True, False), (False, True)):
                yield Build(mma, dtype, arch, aligned, split, low_rank=low_rank)
            yield Build(mma, dtype, arch, aligned, halves=True)
        yield Build(gluon_configs.MMA_SP[0], dtype, arch, aligned=False, ones=True)
        yield Build(None, dtype, arch, aligned=False)
        for wgmma, aligned, low_rank in itertools.product(gluon_configs.WGMMA_SP if arch == 90 else (), both, both):
            yield Build(wgmma, dtype, arch, aligned, low_rank=low_rank)
            yield Build(wgmma, dtype, arch, aligned, low_rank=low_rank, bias=False)
            yield Build(wgmma, dtype, arch, aligned, split=True, low_rank=low_rank)
            if wgmma.staged:
                yield Build(wgmma, dtype, arch, aligned, low_rank=low_rank, halves=True)


def compile_offline(build: Build) -> Result:
    """Compile with the ptxas that comes with Triton and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    c = build.config
    kernel, signature, attributes = _signature(build)
    compiled = triton.compile(
        GluonASTSource(kernel, signature, build.constants(), attributes),
        target=GPUTarget("cuda", build.arch, 32),
        options={"num_warps": 4 if c is None else c.warps, "maxnreg": c.registers if isinstance(c, MmaSp) else None},
    )
    code, usage = _disassembled(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    ptx = compiled.asm["ptx"]
    of_dtype = r"\.F32" + (r"\.BF16\b" if build.dtype is torch.bfloat16 else r"\s")
    sparse = len(re.findall(r"\bHMMA\.SP\.16832" + of_dtype, code))
    sparse += len(re.findall(r"\bHGMMA\.SP\.64x\d+x32" + of_dtype, code))
    tensor = len(re.findall(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA)\b", code))
    cp_async = re.findall(r"cp\.async\.c[ag]\.shared[^;]*;", ptx)
    registers = re.search(r"REG:(\d+)", usage)
    return Result(
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        registers=int(registers.group(1)) if registers else 0,
        shared=compiled.metadata.shared,
        sparse=sparse,
        dense=tensor - sparse,
        copies=len(cp_async) + len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        unfilled=sum(copy.count(",") < 3 for copy in cp_async),
        narrow=sum(not re.search(r",\s*(0x10|16)\s*,", copy) for copy in cp_async),
        ldmatrix=len(re.findall(r"\bLDSM\.16\.M88\.4\b", code)),
        in_flight=len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", code)),
        loop=_loop(code),
        build=tuple(_build_problems(ptx, c)) if isinstance(c, WgmmaSp) else (),
    )


def _signature(build: Build) -> tuple[Any, dict[str, str], dict[tuple[int, ...], list[Any]]]:
    """The kernel, the types of its arguments, and the arguments that are multiples of 16."""
    from slope_compile.kernels import gluon_mma_sp, gluon_wgmma_sp

    c = build.config
    element = f"*{NAMES[build.dtype]}"
    types = {"X": "*i32", "V": "*i32", "P": "*i16", "T": "*i32", "B": "*i32", "BIAS": element, "PARTS": "*fp32"}
    types["Y"] = "*fp32" if build.split else element
    if isinstance(c, WgmmaSp):
        kernel = gluon_wgmma_sp.forward
        types["P"] = {2: "*i16", 8: "*i64"}[build.piece]
        types |= {"x_desc": _tiles(c.BM, 32), "v_desc": _tiles(c.BN, 16), "t_desc": _tiles(c.BM, 32)}
        divisible = {"Y"}
    else:
        kernel = gluon_mma_sp.add_up if c is None else gluon_mma_sp.forward
        types["P"] = {1: "*u8", 2: "*i16", 8: "*i64"}[build.piece]
        known = {"X", "V", "P", "T", "B", "BIAS", "N", "K", "R", "stride_xm"} if build.aligned else set()
        divisible = known | {"Y"}
    constants = build.constants()
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    positions = [(i,) for i, name in enumerate(kernel.arg_names) if name in divisible - constants.keys()]
    return kernel, signature, {position: [["tt.divisibility", 16]] for position in positions}


def _tiles(rows: int, columns: int) -> str:
    layout = f"NVMMASharedLayout(swizzle_byte_width={4 * columns}, element_bitwidth=32, rank=2)"
    return f"tensordesc<i32[{rows}, {columns}],{layout}>"


def _build_problems(ptx: str, config: WgmmaSp) -> list[str]:
    from slope_compile.kernels._gluon import assembler

    return gluon_builds.problems(ptx, config, gluon_builds.assemble(ptx, assembler(90), "sm_90a"))


def _loop(code: str) -> int:
    """Instructions between the label of the loop with the sparse tensor core's work and its branch back."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for position, line in enumerate(lines):
        label = re.match(r"^\.(L_x_\d+):", line)
        if label:
            labels[label.group(1)] = position
        back = re.search(r"\bBRA\b.*\(\.(L_x_\d+)\)", line)
        if back and back.group(1) in labels:
            body = "\n".join(lines[labels[back.group(1)] : position + 1])
            found.append((-body.count("MMA.SP"), len(re.findall(r"/\*[0-9a-f]{4,}\*/", body))))
    return min(found)[1] if found else 0


def describe(result: Result) -> str:
    return f"{result.registers} registers, {result.shared} B, loop {result.loop} with {result.sparse} sparse"


if __name__ == "__main__":
    sys.exit(script(builds, compile_offline, describe))
