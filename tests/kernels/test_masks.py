"""The forward mask: reproducible, uniform, deterministic in ties, and faithful to a weight that has one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from problems import draw_mask, every_pattern
from slope_compile.kernels.masks import choose_mask, has_pattern, magnitude_mask, random_mask
from slope_compile.pattern import Pattern

TWO_FOUR = Pattern(2, 4)
KINDS = ["random", "magnitude"]


def kept_per_group(mask: Tensor, nm: Pattern) -> set[int]:
    """The different numbers of kept entries in a group: ``{keep}`` for a legal mask."""
    return set(mask.view(mask.shape[0], -1, nm.group).sum(-1).unique().tolist())


@every_pattern
def test_every_group_keeps_exactly_keep(nm: Pattern) -> None:
    weight = torch.randn(7, 5 * nm.group)
    for kind in KINDS:
        mask = choose_mask(weight, nm, kind, 0, "a")
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        assert kept_per_group(mask, nm) == {nm.keep}


# --- random ------------------------------------------------------------


def test_a_random_mask_depends_on_seed_and_path_alone() -> None:
    torch.manual_seed(1)
    first = random_mask(16, 32, TWO_FOUR, 7, "h.0.up")
    state = torch.get_rng_state()
    random_mask(8, 8, TWO_FOUR, 7, "h.1.up")  # another layer before it
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(random_mask(16, 32, TWO_FOUR, 7, "h.0.up"), first)
    # Nor does drawing one move the generator that initialises the rest of the model.
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_mask_is_drawn_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        mask = random_mask(4, 8, TWO_FOUR, 1, "layer")
    assert torch.equal(mask, random_mask(4, 8, TWO_FOUR, 1, "layer"))


def test_a_random_mask_is_the_same_in_every_release() -> None:
    # Pinned: a resumed run that prepares its model with a newer version must find these bits again.
    mask = random_mask(2, 8, TWO_FOUR, 0, "layers.0.up")
    assert mask.int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("seed", "path"),
    [
        pytest.param(1, "h.0.up", id="other_seed"),
        pytest.param(0, "h.1.up", id="other_path"),
        pytest.param(-1, "h.0.up", id="negative_seed"),
        pytest.param(2**70, "h.0.up", id="seed_past_64_bits"),
    ],
)
def test_other_seeds_and_paths_give_other_masks(seed: int, path: str) -> None:
    base = random_mask(32, 32, TWO_FOUR, 0, "h.0.up")
    other = random_mask(32, 32, TWO_FOUR, seed, path)
    # Independent choices agree in a sixth of the groups: 43 of 256, with a standard deviation of 6.
    same = (base == other).view(-1, 4).all(-1).sum().item()
    assert 43 - 36 < same < 43 + 36


def test_the_six_patterns_are_equally_likely() -> None:
    groups = 60_000
    mask = random_mask(groups // 100, 400, TWO_FOUR, 3, "uniform").view(groups, 4)
    codes = (mask * torch.tensor([1, 2, 4, 8])).sum(-1)
    legal = [sum(1 << i for i in pair) for pair in itertools.combinations(range(4), 2)]
    counts = [int((codes == code).sum()) for code in legal]
    assert sum(counts) == groups
    chi_square = sum((count - groups / 6) ** 2 / (groups / 6) for count in counts)
    # 5 degrees of freedom: above 20.5 in one of a thousand fair draws, and this draw is always the same one.
    assert chi_square < 20.5, counts


def test_rows_are_independent() -> None:
    # The lemma on imposed zeros needs survivors of a column group to be Binomial(4, 1/2): check the counts.
    mask = random_mask(400, 400, TWO_FOUR, 5, "rows")
    survivors = mask.view(100, 4, 400).sum(1).flatten()
    for j in range(5):
        expected = survivors.numel() * math.comb(4, j) / 16
        assert abs(int((survivors == j).sum()) - expected) < 5 * math.sqrt(expected)


# --- magnitude ------------------------------------------------------------


def test_magnitude_keeps_the_largest_whatever_their_sign() -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0, -0.2, 0.0, 0.3, 0.2, -0.1]])
    assert magnitude_mask(weight, TWO_FOUR).int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 0]]


@every_pattern
def test_magnitude_agrees_with_choosing_group_by_group(nm: Pattern) -> None:
    weight = torch.randn(6, 3 * nm.group)
    mask = magnitude_mask(weight, nm)
    for n, g in itertools.product(range(6), range(3)):
        group = weight[n, g * nm.group : (g + 1) * nm.group].abs()
        expected = {i for _, i in sorted((-float(v), i) for i, v in enumerate(group))[: nm.keep]}
        got = mask[n, g * nm.group : (g + 1) * nm.group].nonzero().flatten().tolist()
        assert set(got) == expected


@every_pattern
def test_of_equal_magnitudes_the_first_are_kept(nm: Pattern) -> None:
    ties = torch.ones(40, 6 * nm.group)
    ties[:, ::2] *= -1
    expected = torch.arange(ties.shape[1]) % nm.group < nm.keep
    assert torch.equal(magnitude_mask(ties, nm), expected.expand_as(ties))


def test_magnitude_takes_any_layout() -> None:
    weight = torch.randn(8, 12).t()
    assert torch.equal(magnitude_mask(weight, TWO_FOUR), magnitude_mask(weight.contiguous(), TWO_FOUR))
    assert has_pattern(weight * magnitude_mask(weight, TWO_FOUR), TWO_FOUR)


# --- a weight that is N:M already ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@every_pattern
def test_a_weight_with_the_pattern_keeps_it(nm: Pattern, kind: str) -> None:
    mask = draw_mask(9, 6 * nm.group, nm)
    weight = torch.randn(9, 6 * nm.group) * mask
    assert has_pattern(weight, nm)
    assert torch.equal(choose_mask(weight, nm, kind, 0, "p"), mask)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_kept_weights_are_kept_all_the_same(kind: str) -> None:
    # Compared as numbers, not after a conversion that would flush them to zero.
    mask = draw_mask(4, 16, TWO_FOUR)
    weight = mask * 2.0**-149
    assert torch.equal(choose_mask(weight, TWO_FOUR, kind, 0, "p"), mask)


@every_pattern
def test_a_kept_weight_that_became_zero_lets_no_pruned_one_in(nm: Pattern) -> None:
    mask = random_mask(32, 8 * nm.group, nm, 4, "h.0")
    weight = torch.randn(32, 8 * nm.group) * mask
    weight[mask & (torch.rand_like(weight) < 0.3)] = 0.0
    assert torch.equal(choose_mask(weight, nm, "random", 4, "h.0"), mask)


def test_an_all_zero_weight_gets_the_mask_of_the_configuration() -> None:
    zero = torch.zeros(8, 16)
    drawn = random_mask(8, 16, TWO_FOUR, 4, "h.0")
    assert torch.equal(choose_mask(zero, TWO_FOUR, "random", 4, "h.0"), drawn)
    first_two = torch.arange(16) % 4 < 2
    assert torch.equal(choose_mask(zero, TWO_FOUR, "magnitude", 4, "h.0"), first_two.expand(8, 16))


def test_one_dense_group_makes_the_whole_weight_dense() -> None:
    weight = torch.randn(8, 16) * draw_mask(8, 16, TWO_FOUR)
    weight[3, 4:7] = 1.0
    assert not has_pattern(weight, TWO_FOUR)
    assert torch.equal(choose_mask(weight, TWO_FOUR, "random", 0, "p"), random_mask(8, 16, TWO_FOUR, 0, "p"))


def test_choosing_does_not_record_a_gradient() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    assert not choose_mask(weight, TWO_FOUR, "magnitude", 0, "p").requires_grad


def test_twice_is_once() -> None:
    weight = torch.randn(16, 32)
    mask = magnitude_mask(weight, TWO_FOUR)
    assert torch.equal(magnitude_mask(weight * mask, TWO_FOUR), mask)
