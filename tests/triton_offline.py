"""Triton kernels compiled to machine code without a GPU, and checks of the machine code.

``python tests/triton_offline.py [80 90 ...]`` compiles every configuration for the named architectures (all by
default), in every dtype, with and without aligned sizes.  It prints a line for each and fails if one is not acceptable
(some ten minutes).  The suite compiles a part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from slope_compile.kernels import triton_configs
from slope_compile.kernels.triton_configs import Config

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Architecture -> most shared memory of one block, in bytes (CUDA programming guide, compute capabilities)."""

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WITH_COLUMNS = {
    "grad_input_columns": "grad_input", "expand_columns": "expand", "compress_given_columns": "compress_columns",
}  # fmt: skip
"""A kernel with a column mask -> its name."""
CONVERSIONS = (
    "expand", "expand_columns", "compress", "compress_columns", "compress_given_columns", "pick_columns",
)  # fmt: skip
KERNELS = ("forward", "grad_input", "grad_input_columns", "grad_weight", *CONVERSIONS)


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

    @property
    def words(self) -> bool:
        """Whether the main loop copies all it reads ahead of its use; for sm_100 the compiler leaves patterns out."""
        halves = self.dtype is not torch.float32
        whole = self.kernel in ("forward", "grad_input") or self.column_words
        return halves and self.arch != 100 and self.aligned and whole

    @property
    def column_words(self) -> bool:
        """Whether a tile's rows of the column mask are whole words."""
        return self.kernel == "grad_input_columns" and self.aligned and self.config.BK % 64 == 0

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
    copies: int = 0
    """Asynchronous copies to shared memory in the PTX."""
    loop_loads: int = 0
    """Loads in the main loop that wait for global memory (LDG)."""
    loop: int = 0
    """Instructions of the main loop."""
    warnings: tuple[str, ...] = ()
    """What ptxas remarks on the use of wgmma: where it has to serialize them."""

    def problems(self, build: Build) -> list[str]:
        """What makes the kernel unacceptable."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        found += self.warnings
        if build.words and self.loop_loads:
            found.append(f"{self.loop_loads} loads that the loop waits for")
        if self.shared > SHARED_MEMORY[build.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        expected = expected_tensor_core(build)
        if expected is not None and not self.tensor_core & expected:
            found.append(f"no {' or '.join(sorted(expected))}")
        return found


def expected_tensor_core(build: Build) -> set[str] | None:
    """Instructions of which one must be there; None where there is nothing to multiply on tensor cores."""
    if build.kernel in CONVERSIONS or (build.dtype is torch.float32 and build.precision == "ieee"):
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
            for config in triton_configs.configurations(configured(kernel), dtype, flag, arch):
                yield Build(kernel, config, dtype, arch, flag)
                if dtype is torch.float32 and kernel not in CONVERSIONS:
                    yield Build(kernel, config, dtype, arch, flag, "tf32")


def configured(kernel: str) -> str:
    """Under which name the configurations of a kernel stand."""
    return WITH_COLUMNS.get(kernel, kernel)


def compile_offline(build: Build) -> Result:
    """Compile with the ptxas that comes with Triton and read the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from slope_compile.kernels import triton_conversions, triton_kernels

    module = triton_conversions if build.kernel in CONVERSIONS else triton_kernels
    kernel = getattr(module, configured(build.kernel))
    c = build.config
    constants: dict[str, Any] = {
        "BM": c.BM, "BN": c.BN, "BK": c.BK, "BR": 16, "HAS_BIAS": True, "HAS_LOW_RANK": True,
        "HAS_COLUMNS": build.kernel in WITH_COLUMNS, "EVEN": build.aligned, "PRECISION": build.precision, "GROUP": 8,
        "TRANSPOSED": build.dtype is torch.float32, "WORDS": build.aligned and c.BK % 32 == 0,
        "COLUMN_WORDS": build.column_words,
    }  # fmt: skip
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = (name.isupper() and len(name) > 1) or name in "XVPTBYCW"
        if pointer:
            signature[name] = "*u8" if name in ("P", "C", "CP") else f"*{NAMES[build.dtype]}"
        else:
            signature[name] = "i32"
        if pointer or build.aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    used = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(kernel, signature, used, attributes)
    target, options = GPUTarget("cuda", build.arch, 32), {"num_warps": c.warps, "num_stages": c.stages}
    compiled, log = compiled_with_log(source, target, options)
    return result_of(compiled, log)


def result_of(compiled: Any, log: str) -> Result:
    """What a compiled kernel's machine code and ptxas say."""
    import triton

    code, usage = _disassembled(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    registers = re.search(r"REG:(\d+)", usage)
    loop = main_loop(code)
    return Result(
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        registers=int(registers.group(1)) if registers else 0,
        shared=compiled.metadata.shared,
        tensor_core=frozenset(re.findall(r"\b(UTC[A-Z]*MMA|HGMMA|HMMA)\b", code)),
        copies=len(re.findall(r"cp\.async\.c[ag]\.", compiled.asm["ptx"])),
        loop_loads=len(re.findall(r"\bLDG\b", loop)),
        loop=len(re.findall(r"/\*[0-9a-f]{4,}\*/", loop)),
        warnings=tuple(re.findall(r"\(C75\d\d\)[^\n]*", log)),
    )


def compiled_with_log(source: Any, target: Any, options: dict[str, int]) -> tuple[Any, str]:
    """A kernel compiled anew, and what ptxas said about it."""
    import triton
    from triton import knobs

    said = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=options)
    return compiled, said.getvalue()


def main_loop(code: str) -> str:
    """From the label of the longest loop with tensor-core instructions to its branch back; empty if there is none."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    longest = ""
    for position, line in enumerate(lines):
        label = re.match(r"^\.(L_x_\d+):", line)
        if label:
            labels[label.group(1)] = position
        back = re.search(r"\bBRA\b.*\(\.(L_x_\d+)\)", line)
        if back and back.group(1) in labels:
            body = "\n".join(lines[labels[back.group(1)] : position + 1])
            if "MMA" in body and len(body) > len(longest):
                longest = body
    return longest


def _disassembled(cubin: bytes, tools: Path) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [tools / "nvdisasm", "-c", file.name], [tools / "cuobjdump", "-res-usage", file.name]
        outputs = [subprocess.run(list(map(str, c)), capture_output=True, text=True, check=True) for c in commands]
    return outputs[0].stdout, outputs[1].stdout + outputs[1].stderr


def script(
    builds: Callable[[tuple[int, ...]], Iterable[Any]],
    compile_one: Callable[[Any], Any],
    describe: Callable[[Any], str],
    arguments: Sequence[str] = sys.argv[1:],
) -> int:
    """Compile all that there is for the named architectures, or for every one; a line for each.

    Returns:
        The exit status: 1 if a build is not acceptable.
    """
    archs = tuple(map(int, arguments)) or tuple(SHARED_MEMORY)
    failed = 0
    for build in builds(archs):
        result = compile_one(build)
        problems = result.problems(build)
        failed += bool(problems)
        print(f"{build}: {describe(result)} {problems}", flush=True)
    print(f"{failed} not acceptable")
    return int(bool(failed))


def describe(result: Result) -> str:
    cost = f"{result.registers} registers, {result.shared} B, loop of {result.loop}, {result.copies} copies"
    return f"{cost}, {sorted(result.tensor_core)}"


if __name__ == "__main__":
    sys.exit(script(lambda archs: builds(archs, tuple(NAMES)), compile_offline, describe))
