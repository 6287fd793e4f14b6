"""Masks of the weights that are kept: random, by magnitude, or the pattern that a weight already has.

Every function returns a ``keep_mask`` (True = kept), bool ``[N, K]``, with exactly ``keep`` of every ``group``
consecutive entries of a row kept.
"""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor

from slope_compile.pattern import Pattern


def magnitude_mask(weight: Tensor, nm: Pattern) -> Tensor:
    """Keep the largest magnitudes of each group, on a tie the first (deterministic on every device)."""
    N, K = weight.shape
    groups = weight.detach().abs().view(N, K // nm.group, nm.group)
    order = groups.sort(dim=-1, descending=True, stable=True).indices[..., : nm.keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).view(N, K)


def seeded_generator(text: str) -> torch.Generator:
    """A generator on the CPU whose seed depends on the text only, on every machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_mask(N: int, K: int, nm: Pattern, seed: int, path: str) -> Tensor:
    """Keep a uniformly random choice of each group; the mask is on the CPU.

    It depends only on seed, module path and shape, not on a global generator, default device, rank or order of calls.
    """
    generator = seeded_generator(f"{seed}:{path}")
    choices = torch.tensor(
        [[i in kept for i in range(nm.group)] for kept in itertools.combinations(range(nm.group), nm.keep)],
        device="cpu",
    )
    drawn = torch.randint(len(choices), (N * K // nm.group,), generator=generator, device="cpu")
    return choices.index_select(0, drawn).view(N, K)


def has_pattern(weight: Tensor, nm: Pattern) -> bool:
    """Whether every group of the weight has at most ``keep`` nonzero entries."""
    N, K = weight.shape
    nonzero = (weight.detach() != 0).view(N, K // nm.group, nm.group).sum(-1)
    return bool((nonzero <= nm.keep).all())


def choose_mask(weight: Tensor, nm: Pattern, kind: str, seed: int, path: str) -> Tensor:
    """The static forward mask of a weight ``[N, K]``.

    A weight that is N:M already keeps its pattern: every nonzero entry is kept.  A group with fewer than ``keep``
    nonzero entries is filled up from the mask that the configuration would have chosen.  A weight pruned earlier with
    the same seed and path thus gets the same mask again, even if a kept entry has become exactly 0.
    """
    if kind == "random":
        N, K = weight.shape
        chosen = random_mask(N, K, nm, seed, path).to(weight.device)
    else:
        chosen = magnitude_mask(weight, nm)
    if not has_pattern(weight, nm):
        return chosen
    # Priorities, of which the top ``keep`` win: 2 for nonzero entries, plus 1 for entries that would have been chosen.
    return magnitude_mask((weight.detach() != 0).to(torch.int8) * 2 + chosen.to(torch.int8), nm)
