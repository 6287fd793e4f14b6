"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, by the driver in ``fuzz_cpu.cpp``.

A longer run by hand, with other seeds, or for data races::

    SLOPE_FUZZ_SECONDS=3600 SLOPE_FUZZ_SEED=1000000 pytest tests/kernels/test_cpu_fuzz.py
    SLOPE_FUZZ_SANITIZERS=thread pytest tests/kernels/test_cpu_fuzz.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slope_compile.errors import PatternError
from slope_compile.kernels import cpu_build, cpu_library
from slope_compile.kernels.cpu_build import FLAGS, LEVELS, SOURCE, Compiler
from slope_compile.kernels.metadata import check_pattern
from slope_compile.pattern import Pattern

DRIVER = Path(__file__).with_name("fuzz_cpu.cpp")
SECONDS = float(os.environ.get("SLOPE_FUZZ_SECONDS", "10"))
SEED = int(os.environ.get("SLOPE_FUZZ_SEED", "1"))
SANITIZERS = os.environ.get("SLOPE_FUZZ_SANITIZERS", "address,undefined")

BEST = next(level for level in LEVELS if not cpu_build.missing_features(level))
_24 = Pattern(2, 4)

ENVIRONMENT = {
    "ASAN_OPTIONS": "max_malloc_fill_size=1073741824:malloc_fill_byte=255",  # what was never written is a NaN
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def compile_with(compiler: Compiler, *arguments: str | Path, sanitizers: str = SANITIZERS) -> None:
    command = [*compiler.command, "-std=c++20", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    result = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """A compiler that has the sanitizers."""
    found = cpu_build.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "nothing.cpp").write_text("int main() { return 0; }\n")
    try:
        compile_with(found, folder / "nothing.cpp", "-o", folder / "nothing")
    except AssertionError:
        pytest.skip(f"{found} cannot link -fsanitize={SANITIZERS}")
    return found


@pytest.fixture(scope="module")
def driver(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver's object file: its own loops need no checking, and without it are many times faster."""
    result = tmp_path_factory.mktemp("driver") / "fuzz_cpu.o"
    compile_with(compiler, "-fno-sanitize=all", "-O2", "-Wall", "-Wextra", "-Werror", "-c", DRIVER, "-o", result)
    return result


def build(driver: Path, compiler: Compiler, level: str, source: Path, folder: Path) -> Path:
    """The driver with the kernels of one level."""
    kernels, program = folder / "kernels.o", folder / "fuzz"
    compile_with(compiler, "-O1", *FLAGS[level], "-c", source, "-o", kernels)
    compile_with(compiler, driver, kernels, "-pthread", "-o", program)
    return program


def fuzz(program: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of a run."""
    result = subprocess.run(
        [program, *options],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS * 2 + 300,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("level", dict.fromkeys([BEST, "portable"]))
def test_random_calls(level: str, driver: Path, compiler: Compiler, tmp_path: Path) -> None:
    """Right, within bounds, and the same for any number of threads; and within bounds with any bytes as metadata."""
    program = build(driver, compiler, level, SOURCE, tmp_path)
    for options in (("--nulls", "1", "--seconds", str(SECONDS)), ("--garbage", "1", "--seconds", str(SECONDS / 4))):
        status, output = fuzz(program, "--seed", str(SEED), *options)
        assert status == 0, output[-10_000:]
        assert f"{level}:" in output


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the linker replaces aligned_alloc")
def test_threads_without_memory_say_so_without_a_race(tmp_path: Path) -> None:
    """Several threads of a call may note at the same time that they have no memory."""
    compiler = cpu_build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "nothing.cpp").write_text("int main() { return 0; }\n")
    try:
        compile_with(compiler, tmp_path / "nothing.cpp", "-o", tmp_path / "nothing", sanitizers="thread")
    except AssertionError:
        pytest.skip(f"{compiler} cannot link -fsanitize=thread")
    kernels, program = tmp_path / "kernels.o", tmp_path / "no_memory"
    compile_with(compiler, "-O1", *FLAGS[BEST], "-c", SOURCE, "-o", kernels, sanitizers="thread")
    linked = ("-Wl,--wrap=aligned_alloc", "-pthread", "-o", program)
    compile_with(compiler, "-O1", DRIVER.with_name("no_memory.cpp"), kernels, *linked, sanitizers="thread")
    status, output = fuzz(program)
    assert status == 0, output[-10_000:]
    many = [line.partition(": ")[2].split() for line in output.splitlines() if "M 300" in line]
    assert [statuses[:3] for statuses in many] == [["1"] * 3] * 3, output  # the weight gradient may need no memory


# --- metadata -------------------------------------------------------------------------------------------


def draw(kind: str, N: int, K: int) -> torch.Tensor:
    """Metadata that are arbitrary, or legal but for one bit, or legal."""
    if kind == "arbitrary":
        return torch.randint(256, (N, (K + 7) // 8), dtype=torch.uint8)
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12])[torch.randint(6, (N, 2 * ((K + 7) // 8)))]
    nibbles[:, K // 4 :] = 0
    pattern = (nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8)
    if kind == "one bit" and pattern.numel():
        pattern.view(-1)[torch.randint(pattern.numel(), ())] ^= 1 << int(torch.randint(8, ()))
    return pattern


@pytest.mark.parametrize("kind", ["legal", "one bit", "arbitrary"])
def test_illegal_metadata_are_refused_before_a_kernel_sees_them(kind: str) -> None:
    """By the check in Python, which agrees with the one in C++ about every pattern."""
    library = cpu_library.load()
    for _ in range(200):
        N, K = int(torch.randint(6, ())), 4 * int(torch.randint(1, 12, ()))
        pattern = draw(kind, N, K)
        legal = kind == "legal" or pattern.numel() == 0
        if library is not None:
            illegal = library.illegal_groups(pattern.data_ptr(), N, K)
            legal = illegal == 0 if kind == "arbitrary" else legal
            assert (illegal == 0) == legal
        elif kind == "arbitrary":
            continue
        if legal:
            check_pattern(pattern, K, _24, "layer")
        else:
            with pytest.raises(PatternError, match="layer"):
                check_pattern(pattern, K, _24, "layer")


# --- empty ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "M"),
    [
        (torch.float32, 1),
        (torch.float32, 3),
        (torch.float32, 20),
        (torch.bfloat16, 1),
        (torch.bfloat16, 3),
        (torch.bfloat16, 20),
    ],
)
def test_empty_sums(dtype: torch.dtype, M: int) -> None:
    """No input features, or no outputs: what is added up is nothing, and an empty tensor has no address."""
    library = cpu_library.load()
    if library is None:
        pytest.skip("no CPU kernels on this machine")
    code, nothing = [torch.float32, torch.bfloat16].index(dtype), torch.empty(0)
    assert nothing.data_ptr() == 0
    bias, y = torch.randn(5).to(dtype), torch.full((M, 5), torch.nan, dtype=dtype)
    assert library.forward(code, 1, 0, 0, 1, 0, 0, bias.data_ptr(), None, None, 0, y.data_ptr(), M, 5, 0) == 0
    assert torch.equal(y, bias.expand(M, 5))
    dx = torch.full((M, 8), torch.nan, dtype=dtype)
    assert library.grad_input(code, 1, 0, 0, 1, 0, 0, None, dx.data_ptr(), M, 0, 8) == 0
    assert torch.equal(dx, torch.zeros_like(dx))
