"""The self-test of the CPU kernels: it passes what is right and notices one wrong number anywhere."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

from slope_compile.kernels import cpu_library
from slope_compile.kernels.cpu_library import CpuLibrary, Function
from slope_compile.kernels.cpu_self_test import self_test


@pytest.fixture
def library() -> CpuLibrary:
    found = cpu_library.load()
    if found is None:
        pytest.skip("no CPU kernels on this machine")
    return found


class Result:
    """The result of a function, found through its arguments."""

    def __init__(self, position: int, numbers: Callable[[int, int, int], int], is_bytes: bool = False) -> None:
        self.position, self.numbers, self.is_bytes = position, numbers, is_bytes

    def last_byte(self, arguments: tuple[int, ...], has_tokens: bool) -> int:
        """The address of the sign and the upper bits of the exponent of its last number."""
        M, N, K = arguments[-3:] if has_tokens else (0, *arguments[-2:])
        size = 1 if self.is_bytes else 4 if arguments[0] == 0 else 2
        return arguments[self.position] + self.numbers(M, N, K) * size - 1


PRODUCTS = {
    "forward": Result(11, lambda M, N, K: M * N),
    "grad_input": Result(8, lambda M, N, K: M * K),
    "grad_weight": Result(9, lambda M, N, K: N * K // 2),
}
MOVES = {
    "compress": Result(6, lambda M, N, K: N * K // 2),
    "expand": Result(5, lambda M, N, K: N * K),
    "pick_columns": Result(4, lambda M, N, K: N * -(-K // 16), is_bytes=True),
    "compress_columns": Result(5, lambda M, N, K: N * K // 2),
}


class Changed:
    """A library, one function of which does something else in one of its calls."""

    forward: Function
    grad_input: Function
    grad_weight: Function
    compress: Function
    expand: Function
    pick_columns: Function
    compress_columns: Function
    illegal_groups: Function

    def __init__(self, library: CpuLibrary, name: str, wrong: Function) -> None:
        for each in (*PRODUCTS, *MOVES, "illegal_groups"):
            setattr(self, each, wrong if each == name else getattr(library, each))


def test_a_right_library_passes(library: CpuLibrary) -> None:
    assert self_test(library) is None


@pytest.mark.parametrize("dtype", [0, 1, 2], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", [*PRODUCTS, *MOVES])
def test_one_wrong_number(name: str, dtype: int, library: CpuLibrary) -> None:
    """The last number of every result of one dtype, the same for every number of threads."""
    right: Function = getattr(library, name)

    def wrong(*arguments: int) -> int:
        status = right(*arguments)
        if arguments[0] == dtype:
            last = (PRODUCTS | MOVES)[name].last_byte(arguments, name in PRODUCTS)
            ctypes.c_uint8.from_address(last).value ^= 0x40
        return status

    said = self_test(Changed(library, name, wrong))
    assert said is not None
    assert said.startswith(f"{name} is wrong for {('torch.float32', 'torch.bfloat16', 'torch.float16')[dtype]}")


@pytest.mark.parametrize("name", [*PRODUCTS, *MOVES])
def test_a_result_that_depends_on_the_threads(name: str, library: CpuLibrary) -> None:
    right: Function = getattr(library, name)

    def wrong(*arguments: int) -> int:
        status = right(*arguments)
        if arguments[1] > 1:
            last = (PRODUCTS | MOVES)[name].last_byte(arguments, name in PRODUCTS)
            ctypes.c_uint8.from_address(last - 1).value ^= 1
        return status

    assert self_test(Changed(library, name, wrong)) is not None


@pytest.mark.parametrize("name", [*PRODUCTS, *MOVES])
def test_an_error_status(name: str, library: CpuLibrary) -> None:
    assert self_test(Changed(library, name, lambda *arguments: 1)) is not None


def test_an_illegal_pattern_that_passes(library: CpuLibrary) -> None:
    said = self_test(Changed(library, "illegal_groups", lambda *arguments: 0))
    assert said is not None
    assert said.startswith("illegal_groups")


@pytest.mark.parametrize(
    ("name", "at", "said"),
    [
        ("expand", 4, "expand (double-pruned)"),
        ("grad_input", 7, "grad_input (double-pruned)"),
        ("compress_columns", 4, "compress_columns (masked)"),
    ],
)
def test_the_column_mask_counts(name: str, at: int, said: str, library: CpuLibrary) -> None:
    right: Function = getattr(library, name)

    def without(*arguments: int | None) -> int:
        return right(*arguments[:at], None, *arguments[at + 1 :])

    found = self_test(Changed(library, name, without))
    assert found is not None
    assert found.startswith(said)
