"""Packed metadata: the bits are where the documentation says, and what is not legal is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from problems import draw_mask, every_pattern, packed
from slope_compile.errors import PatternError
from slope_compile.kernels import metadata
from slope_compile.kernels.metadata import check_pattern, kept_columns, pack_mask, packed_width, unpack_mask
from slope_compile.pattern import Pattern

TWO_FOUR = Pattern(2, 4)


def widths(nm: Pattern) -> list[int]:
    """One group, a byte and a bit, several bytes: K that end inside a byte where the group allows it."""
    return [nm.group, 8 + nm.group, 24, 5 * nm.group]


def test_bits_of_a_row_written_by_hand() -> None:
    # Columns 0, 3 | 5, 6 | 8, 9: first byte 0b0110_1001, second 0b0000_0011.
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [0, 3, 5, 6, 8, 9]] = True
    assert pack_mask(mask).tolist() == [[0b0110_1001, 0b0000_0011]]


@every_pattern
def test_pack_and_unpack_are_inverse_and_pad_with_zeros(nm: Pattern) -> None:
    for K in widths(nm):
        mask = draw_mask(5, K, nm)
        pattern = pack_mask(mask)
        assert pattern.dtype == torch.uint8
        assert pattern.shape == (5, packed_width(K))
        assert torch.equal(pattern, packed(mask))
        assert torch.equal(unpack_mask(pattern, K), mask)
        assert not unpack_mask(pattern, 8 * packed_width(K))[:, K:].any()


def test_packs_a_mask_that_is_not_contiguous() -> None:
    mask = draw_mask(8, 16, TWO_FOUR).t()
    assert torch.equal(pack_mask(mask), packed(mask.contiguous()))


@pytest.mark.parametrize(("K", "width"), [(1, 1), (8, 1), (9, 2), (36, 5), (4096, 512)])
def test_one_bit_per_dense_element(K: int, width: int) -> None:
    assert packed_width(K) == width


@every_pattern
def test_kept_columns_are_ascending_positions_inside_the_group(nm: Pattern) -> None:
    # Every legal group once, so that the whole table is read.
    choices = list(itertools.combinations(range(nm.group), nm.keep))
    K = len(choices) * nm.group
    mask = torch.zeros(1, K, dtype=torch.bool)
    for i, choice in enumerate(choices):
        mask[0, [i * nm.group + c for c in choice]] = True
    columns = kept_columns(packed(mask), K, nm.keep, nm.group)
    assert columns.dtype == torch.int64
    assert columns.tolist() == [[list(choice) for choice in choices]]


def test_kept_columns_can_be_used_in_autograd_after_a_first_call_in_inference_mode() -> None:
    # The table is cached: were it an inference tensor, the first caller's mode would decide for all others.
    nm = Pattern(3, 8)  # a pattern that no other test uses, so that the first call is here
    pattern = packed(draw_mask(2, 8, nm))
    with torch.inference_mode():
        kept_columns(pattern, 8, 3, 8)
    columns = kept_columns(pattern, 8, 3, 8)
    weight = torch.randn(2, 1, 8, requires_grad=True)
    weight.gather(-1, columns).sum().backward()
    assert weight.grad is not None
    assert weight.grad.sum() == 6


def test_no_table_is_kept_but_on_the_cpu() -> None:
    """On a GPU it may lie in the memory of a CUDA graph, which then is not the graph's to use again."""
    metadata._kept_table.cache_clear()
    pattern = packed(draw_mask(2, 8, TWO_FOUR))
    assert kept_columns(pattern.to("meta"), 8, 2, 4).shape == (2, 2, 2)
    assert metadata._kept_table.cache_info().currsize == 0
    kept_columns(pattern, 8, 2, 4)
    assert metadata._kept_table.cache_info().currsize == 1


@pytest.mark.parametrize(("keep", "group"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 8)])
def test_the_table_of_every_code_is_made_where_it_is_used(keep: int, group: int) -> None:
    """Of illegal codes too; by nothing that a CUDA graph cannot hold, as a copy from the host."""
    copies = ("lift_fresh", "_local_scalar_dense", "nonzero")  # the first is what torch.tensor ends in

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket.__name__ not in copies
            return func(*args, **(kwargs or {}))

    with Watched():  # type: ignore[no-untyped-call]
        table = metadata._made_table(keep, group, torch.device("cpu"))
        pack_mask(torch.ones(2, 12, dtype=torch.bool))
    for code in range(1 << group):
        kept = [i for i in range(group) if code >> i & 1][:keep]
        assert table[code].tolist() == kept + [0] * (keep - len(kept))


@every_pattern
def test_legal_metadata_is_accepted(nm: Pattern) -> None:
    for K in widths(nm):
        check_pattern(packed(draw_mask(4, K, nm)), K, nm, "layer")


def one_more(pattern: Tensor) -> Tensor:
    broken = pattern.clone()
    broken[1, 0] = 0b0011_0111
    return broken


def one_less(pattern: Tensor) -> Tensor:
    broken = pattern.clone()
    broken[1, 0] = 0b0011_0001
    return broken


def past_the_end(pattern: Tensor) -> Tensor:
    broken = pattern.clone()
    broken[0, -1] |= 0b0011_0000  # K = 12: the last nibble is padding
    return broken


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(one_more, "1 of 9 groups do not keep exactly 2 of 4", id="three_of_four"),
        pytest.param(one_less, "1 of 9 groups", id="one_of_four"),
        pytest.param(torch.zeros_like, "9 of 9 groups", id="all_zero"),
        pytest.param(past_the_end, "corrupt", id="bits_past_K"),
        pytest.param(lambda p: p.to(torch.int64), r"uint8 \[N, 2\].*int64", id="dtype"),
        pytest.param(lambda p: p[:, :1], r"K = 12, got torch.uint8 \[3, 1\]", id="too_narrow"),
        pytest.param(lambda p: p[0], r"got torch.uint8 \[2\]", id="one_dimension"),
    ],
)
def test_illegal_metadata_is_refused_with_the_name(damage: object, says: str) -> None:
    assert callable(damage)
    pattern = damage(packed(draw_mask(3, 12, TWO_FOUR)))
    with pytest.raises(PatternError, match=says) as caught:
        check_pattern(pattern, 12, TWO_FOUR, "layers.0.up")
    assert str(caught.value).startswith("layers.0.up: ")


def test_metadata_of_another_pattern_is_refused() -> None:
    one_four = packed(draw_mask(3, 16, Pattern(1, 4)))
    with pytest.raises(PatternError, match="belongs to another pattern"):
        check_pattern(one_four, 16, TWO_FOUR, "w")
