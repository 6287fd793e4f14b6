"""The operators on CPU tensors: operands that do not fit, empty weights, any place in memory, several threads.

What they compute is checked against the definitions and float64 in ``test_ops`` and ``test_reference``.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from problems import Operands
from slope_compile.kernels import cpu_library, ops, reference

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- operands that do not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", [(slice(3),), (slice(None), slice(2))], ids=["rows", "columns"])
@pytest.mark.parametrize("name", Operands(1, 4, 4).calls(ops))
def test_a_pattern_of_another_weight_is_an_error(name: str, part: tuple[slice, ...]) -> None:
    """The kernels check nothing: they would read past its end."""
    given = Operands(5, 16, 24)
    given.pattern = given.pattern[part]
    with pytest.raises(RuntimeError):
        given.calls(ops)[name]()


@pytest.mark.parametrize("part", [(slice(3),), (slice(None), slice(1))], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["grad_input_columns", "compress_columns"])
def test_a_column_mask_of_another_weight_is_an_error(name: str, part: tuple[slice, ...]) -> None:
    given = Operands(5, 16, 24)
    given.column_mask = given.column_mask[part]
    with pytest.raises(RuntimeError):
        given.calls(ops)[name]()


@pytest.mark.parametrize("short", ["bias", "down", "up"])
def test_what_is_added_must_fit(short: str) -> None:
    given = Operands(5, 16, 24)
    setattr(given, short, getattr(given, short)[:2])
    with pytest.raises(RuntimeError):
        given.calls(ops)["linear"]()


def test_a_bias_for_every_token_is_added_as_the_definition_does() -> None:
    given = Operands(5, 16, 24)
    given.bias = torch.randn(5, 16)
    torch.testing.assert_close(given.calls(ops)["linear"](), given.definitions()["linear"]())


# --- empty ----------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("sizes", [(5, 0, 24), (5, 16, 0), (0, 16, 24), (1, 0, 0), (0, 0, 0)], ids=str)
def test_weights_without_rows_or_columns(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = Operands(*sizes, dtype)
    definitions = given.definitions()
    for name, call in given.calls(ops).items():
        # In 16 bits the definition rounds the low-rank update by itself.
        torch.testing.assert_close(call(), definitions[name](), rtol=0.02, atol=0.02, msg=name)


# --- tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("M", [3, 9, 16, 17, 31, 33, 48, 64, 65, 300])
def test_as_good_as_dense_whatever_the_number_of_tokens(M: int, dtype: torch.dtype) -> None:
    """Kernels change with it.  Sums are longer than what of them is worked on at a time, and end in half a byte."""
    library = cpu_library.load()
    # In what order dense products add up with AVX-512 has not been seen: fp32 is given room there.
    room = 2.0 if dtype == torch.float32 and library is not None and library.isa.startswith("avx512") else 1.1
    for name, N, K in [("linear", 70, 4132), ("grad_input", 2068, 100), ("grad_input_columns", 2068, 100)]:
        given = Operands(M, N, K, dtype)
        values = given.values
        if name == "grad_input_columns":
            values = reference.keep_columns(values, given.column_mask)
        dense = reference.expand(values, given.pattern, 2, 4)
        left, right = given.grad, dense
        if name == "linear":
            left = torch.cat([given.x, given.down, given.x.new_ones(M, 1)], 1)
            right = torch.cat([dense, given.up, given.bias.unsqueeze(1)], 1).t()
        exact = left.double() @ right.double()
        error = (given.calls(ops)[name]().double() - exact).norm()
        assert error <= room * ((left @ right).double() - exact).norm(), name
    given = Operands(M, 70, 132, dtype)
    kept = reference.expand(torch.ones_like(given.values), given.pattern, 2, 4).bool()
    exact = given.grad.double().t() @ given.x.double()
    error = reference.expand(given.calls(ops)["grad_weight"](), given.pattern, 2, 4).double() - exact
    dense_error = (given.grad.t() @ given.x).double() - exact
    assert error[kept].norm() <= room * dense_error[kept].norm(), "grad_weight"


# --- places in memory -----------------------------------------------------------------------------------


def _moved(tensor: Tensor, by: int) -> Tensor:
    """A copy that begins so many elements after the start of its memory, as a part of a larger parameter does."""
    memory = tensor.new_empty(tensor.numel() + by)
    return memory[by:].copy_(tensor.reshape(-1)).view(tensor.shape)


@every_dtype
@pytest.mark.parametrize("M", [1, 7, 40, 300])
def test_results_do_not_depend_on_where_operands_lie(M: int, dtype: torch.dtype) -> None:
    given = Operands(M, 68, 132, dtype)
    expected = {name: call() for name, call in given.calls(ops).items()}
    for by in (1, 3, 8):
        for name, tensor in vars(given).items():
            setattr(given, name, _moved(tensor, by))
        for name, call in given.calls(ops).items():
            assert torch.equal(call(), expected[name]), (name, by)


# --- threads --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("restored_threads")
def test_python_threads_at_once_while_the_number_of_threads_changes() -> None:
    """Each gets what it would get alone, bit by bit: working memory belongs to a thread."""
    if cpu_library.load() is None:
        pytest.skip("no CPU kernels on this machine")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    sizes = ((1, 100, 260), (4, 132, 64), (40, 64, 132), (130, 36, 76), (17, 260, 64))
    problems = [Operands(*each, dtype) for each in sizes for dtype in dtypes]
    torch.set_num_threads(1)
    expected = [{name: call() for name, call in problem.calls(ops).items()} for problem in problems]
    wrong: list[tuple[str, int]] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(15):
            torch.set_num_threads(draw.choice([1, 2, 3]))
            which = draw.randrange(len(problems))
            for name, call in problems[which].calls(ops).items():
                if not torch.equal(call(), expected[which][name]):
                    wrong.append((name, which))

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
