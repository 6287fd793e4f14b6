"""Whether the cost model predicts that the rewrite of a linear is slower than the dense product."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sympy

from slope_compile import cost
from slope_compile.passes._symbols import example
from slope_compile.pattern import Pattern


def example_tokens(shape: Sequence[Any]) -> int | None:
    """M of activations ``[..., features]`` in the run that was traced; None where a size has no value yet.

    Reading the example of a symbolic size puts no guard on it: other sizes run the same graph.
    """
    count = 1
    for size in shape[:-1]:
        value = example(size)
        if value is None:
            return None
        count *= value
    return count


@functools.lru_cache(maxsize=1024)
def objection(
    tokens: int, shape: tuple[int, int], itemsize: int, nm: Pattern, exact: bool, training: bool, device: cost.Device
) -> str:
    """Why the rewrite does not pay, with both predictions and the token counts at which it would; "" where it does.

    Args:
        tokens: M.
        shape: ``(N, K)``.
        itemsize: bytes of an element.
        nm: the pattern.
        exact: whether the input gradient is the exact one.
        training: forward and both gradients count; else the forward product alone.
        device: its peaks.  Where they are for another element size nothing is predicted and nothing refused.
    """
    if not device.fits(itemsize) or tokens < 1:
        return ""
    dense, sparse = cost.DenseLayer(*shape, itemsize), cost.Layer(*shape, itemsize, nm, double_pruned=not exact)
    old = dense.dense_training() if training else dense.dense_forward()
    new = sparse.training() if training else sparse.forward()
    before, after = (float(device.time(c).subs({cost.M: tokens})) for c in (old, new))
    if after <= before:
        return ""
    return (
        f"at M = {tokens} {after * 1e6:.3g} us against {before * 1e6:.3g} us on {device.name}; "
        f"{_pays(cost.profitable(old, new, device))}; leave 'device' out to rewrite it all the same"
    )


def _pays(counts: sympy.Set) -> str:
    """The token counts in words."""
    counts = counts.intersect(sympy.Interval(1, sympy.oo))
    if counts is sympy.S.EmptySet:
        return "it pays at no M"
    pieces = counts.args if isinstance(counts, sympy.Union) else (counts,)
    ends = [(float(piece.inf), float(piece.sup)) for piece in pieces]
    words = [f"above {low:.0f}" if high == float("inf") else f"from {low:.0f} to {high:.0f}" for low, high in ends]
    return f"it pays at M {' or '.join(words)}"
