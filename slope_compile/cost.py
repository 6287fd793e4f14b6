"""What a linear layer and its sparse rewrite cost: FLOPs, bytes and roofline time as sympy expressions in the tokens.

A :class:`Layer` holds the numbers (N, K, R, element size, pattern); its works are functions of the token count, which
is a number, the symbol ``M``, or the product of a graph's own symbols (``s0*s1``, see :func:`tokens`).

Conventions: one multiplication with its addition is 2 FLOPs (as in ``torch.utils.flop_counter``); each tensor that a
product reads or writes moves once, so bytes are a lower bound; metadata is one bit per dense element, and one per value
for the columns.  This is a model: it ranks alternatives and computes where they cross; only a measurement shows which
is fastest.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import sympy

from slope_compile._symbols import expression
from slope_compile.config import nearest
from slope_compile.errors import ConfigError
from slope_compile.pattern import Pattern

M = sympy.Symbol("M", positive=True)
"""Tokens: the product of all sizes of the activations but the last."""

TWO_FOUR = Pattern(2, 4)


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel: what it has to compute and to move."""

    name: str
    flops: sympy.Expr
    """Arithmetic at the positions that are kept."""
    charged: sympy.Expr
    """Arithmetic that the unit is charged for.  The rate of a sparse unit is quoted in FLOPs of the dense product; and
    a unit that cannot skip results computes all of those, also where only the kept ones are wanted."""
    moved: sympy.Expr
    """Bytes read and written."""
    sparse_unit: bool = False


@dataclasses.dataclass(frozen=True)
class Cost:
    """A sequence of kernels."""

    works: tuple[Work, ...]

    @property
    def flops(self) -> sympy.Expr:
        return sympy.expand(sum((w.flops for w in self.works), sympy.Integer(0)))

    @property
    def moved(self) -> sympy.Expr:
        """Bytes."""
        return sympy.expand(sum((w.moved for w in self.works), sympy.Integer(0)))

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.works + other.works)


@dataclasses.dataclass(frozen=True)
class Device:
    """Peaks of a device.  Give what you measured, or take one of :data:`DATA_SHEETS`.

    Raises:
        ConfigError: a rate that is not a positive finite number, or a negative launch overhead.
    """

    name: str
    peak: float
    """FLOP/s of dense products."""
    sparse_peak: float
    """FLOP/s of 2:4 products, counted in FLOPs of the dense product, as data sheets do."""
    bandwidth: float
    """Bytes/s."""
    launch: float = 0.0
    """Seconds that each kernel costs before it does anything; no data sheet states it."""
    itemsize: int | None = None
    """Element size in bytes that the peaks hold for; None = any."""
    source: str = "given"

    def __post_init__(self) -> None:
        for field in ("peak", "sparse_peak", "bandwidth"):
            rate: object = getattr(self, field)
            if not (isinstance(rate, int | float) and math.isfinite(rate) and rate > 0):
                raise ConfigError(f"Device {self.name!r}: {field}: expected a positive number per second, got {rate!r}")
        if not (math.isfinite(self.launch) and self.launch >= 0):
            raise ConfigError(f"Device {self.name!r}: launch: expected seconds, 0 or more, got {self.launch!r}")

    def fits(self, itemsize: int) -> bool:
        """Whether the peaks hold for elements of this size."""
        return self.itemsize in (None, itemsize)

    def time(self, cost: Cost) -> sympy.Expr:
        """Roofline seconds: each kernel takes the larger of its arithmetic and its traffic, and is launched once."""
        return sum((sympy.Max(*self._terms(w)) + _exact(self.launch) for w in cost.works), sympy.Integer(0))

    def _terms(self, work: Work) -> tuple[sympy.Expr, sympy.Expr]:
        peak = self.sparse_peak if work.sparse_unit else self.peak
        return work.charged / _exact(peak), work.moved / _exact(self.bandwidth)


DATA_SHEETS = {
    device.name: device
    for device in (
        Device("A100-SXM-80GB", 312e12, 624e12, 2039e9, itemsize=2, source="NVIDIA A100 data sheet"),
        Device("H100-SXM", 989e12, 1979e12, 3.35e12, itemsize=2, source="NVIDIA H100 data sheet"),
        Device("H200-SXM", 989e12, 1979e12, 4.8e12, itemsize=2, source="NVIDIA H200 data sheet"),
    )
}
"""Peaks for 16-bit elements as published; nothing here was measured."""


def device(name: str, what: str = "device") -> Device:
    """The device of that name in :data:`DATA_SHEETS`.

    Raises:
        ConfigError: there is no data sheet of that name; ``what`` is the argument or option that gave it.
    """
    if name not in DATA_SHEETS:
        raise ConfigError(
            f"{what}: no data sheet for {name!r}; {nearest(str(name), list(DATA_SHEETS))}; "
            "or give a slope_compile.cost.Device"
        )
    return DATA_SHEETS[name]


@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """A linear ``Y [M, N] = X [M, K] W^T`` with elements of ``itemsize`` bytes."""

    N: int
    K: int
    itemsize: int

    @property
    def dense_bytes(self) -> int:
        """The dense weight."""
        return self.N * self.K * self.itemsize

    def dense_forward(self, tokens: sympy.Expr = M) -> Cost:
        """``Y = X W^T``."""
        return Cost((self._dense_product("forward", tokens),))

    def dense_training(self, tokens: sympy.Expr = M) -> Cost:
        """Forward, ``dX = dY W`` and ``dW = dY^T X``."""
        names = ("forward", "grad_input", "grad_weight")
        return Cost(tuple(self._dense_product(name, tokens) for name in names))

    def _dense_product(self, name: str, tokens: sympy.Expr) -> Work:
        flops = 2 * tokens * self.N * self.K
        return Work(name, flops, flops, self._activations(tokens) + self.dense_bytes)

    def _activations(self, tokens: sympy.Expr) -> sympy.Expr:
        return tokens * (self.N + self.K) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Layer(DenseLayer):
    """A linear and its rewrite.

    Raises:
        ConfigError: K is not a multiple of the group, or N is not and ``double_pruned`` is asked for.
    """

    nm: Pattern = TWO_FOUR
    R: int = 0
    """Rank of the adapter that is on; 0 = none."""
    double_pruned: bool = True

    def __post_init__(self) -> None:
        for name, size in (("K", self.K), ("N", self.N)):
            if size % self.nm.group and (name == "K" or self.double_pruned):
                raise ConfigError(f"Layer: {name} = {size} is not a multiple of {self.nm.group}; try another pattern")

    @property
    def values_bytes(self) -> int:
        """The kept values."""
        return self.N * self.nm.compressed(self.K) * self.itemsize

    @property
    def metadata_bytes(self) -> int:
        """The pattern along in_features, packed: one bit per dense element, rows padded to whole bytes."""
        return self.N * math.ceil(self.K / 8)

    @property
    def column_bytes(self) -> int:
        """The column mask: one bit per value, rows padded to whole bytes."""
        return self.N * math.ceil(self.nm.compressed(self.K) / 8)

    def forward(self, tokens: sympy.Expr = M, adapters: bool = True) -> Cost:
        """``Y = X (W^R)^T``, and the adapter's two products."""
        cost = self._sparse_product("forward", tokens, self.values_bytes + self.metadata_bytes)
        return cost + self._adapter_forward(tokens) if adapters and self.R else cost

    def grad_input(self, tokens: sympy.Expr = M) -> Cost:
        """``dX = dY W^{R,C}``, from the forward storage and the column mask; or exactly ``dY W^R``."""
        columns = self.column_bytes if self.double_pruned else 0
        return self._sparse_product("grad_input", tokens, self.values_bytes + self.metadata_bytes + columns)

    def grad_weight(self, tokens: sympy.Expr = M) -> Cost:
        """``dY^T X`` at the kept positions, stored compressed; the unit computes all positions."""
        full = 2 * tokens * self.N * self.K
        moved = self._activations(tokens) + self.values_bytes + self.metadata_bytes
        return Cost((Work("grad_weight", full * self._density, full, moved),))

    def training(self, tokens: sympy.Expr = M) -> Cost:
        """All three products, and those of the adapter."""
        cost = self.forward(tokens) + self.grad_input(tokens) + self.grad_weight(tokens)
        return cost + self._adapter_backward(tokens) if self.R else cost

    @property
    def _density(self) -> sympy.Rational:
        return sympy.Rational(self.nm.keep, self.nm.group)

    def _sparse_product(self, name: str, tokens: sympy.Expr, stored: int) -> Cost:
        """2:4 on a sparse unit; other patterns have none: the weight is expanded and the product is dense."""
        full = 2 * tokens * self.N * self.K
        if self.nm == TWO_FOUR:
            moved = self._activations(tokens) + stored
            return Cost((Work(name, full * self._density, full, moved, sparse_unit=True),))
        zero = sympy.Integer(0)
        expand = Work(f"{name}: expand", zero, zero, sympy.Integer(stored + self.dense_bytes))
        moved = self._activations(tokens) + self.dense_bytes
        return Cost((expand, Work(name, full * self._density, full, moved)))

    def _adapter_forward(self, tokens: sympy.Expr) -> Cost:
        add = tokens * self.N  # scale and add in one kernel: two operands and a result
        return Cost(
            (
                self._thin("down", tokens, self.K),
                self._thin("up", tokens, self.N),
                Work("adapter add", 2 * add, 2 * add, 3 * add * self.itemsize),
            )
        )

    def _adapter_backward(self, tokens: sympy.Expr) -> Cost:
        sizes = (("grad B", self.N), ("grad down", self.N), ("grad A", self.K), ("grad_input of A", self.K))
        return Cost(tuple(self._thin(name, tokens, size) for name, size in sizes))

    def _thin(self, name: str, tokens: sympy.Expr, size: int) -> Work:
        """A product of ``[M, size]``, ``[M, R]`` and ``[size, R]``: two of them are read, the third is written."""
        flops = 2 * tokens * self.R * size
        moved = (tokens * (self.R + size) + self.R * size) * self.itemsize
        return Work(name, flops, flops, moved)


def tokens(shape: Sequence[Any]) -> sympy.Expr:
    """M of activations ``[..., features]``: a number, or an expression in the graph's symbols.

    Args:
        shape: sizes, ints or ``torch.SymInt``, as in ``node.meta["val"].shape``.
    """
    count: sympy.Expr = sympy.Integer(1)
    for size in shape[:-1]:
        count *= expression(size)
    return count


# --- where two costs cross -------------------------------------------------------------------------------------------


def profitable(dense: Cost, rewrite: Cost, device: Device) -> sympy.Set:
    """The token counts M > 0 (reals) at which the rewrite takes less time than the dense layer, exactly.

    Both costs are expressions in :data:`M`.  Times are piecewise linear in M: between two counts at which some kernel
    changes from memory-bound to compute-bound the difference is a line, and its sign is that of its ends.

    Returns:
        A union of intervals with rational ends; ``EmptySet`` = never, ``Interval.open(0, oo)`` = always.
    """
    pairs = [(_line(a), _line(b)) for cost in (dense, rewrite) for a, b in map(device._terms, cost.works)]
    crossings = {_root(a[0] - b[0], a[1] - b[1]) for a, b in pairs}
    ends = [sympy.Integer(0), *sorted(c for c in crossings if c is not None and c > 0), sympy.oo]
    found: sympy.Set = sympy.S.EmptySet
    for low, high in itertools.pairwise(ends):
        inside = low + 1 if high == sympy.oo else (low + high) / 2
        new, old = _time_around(rewrite, device, inside), _time_around(dense, device, inside)
        a, b = new[0] - old[0], new[1] - old[1]  # rewrite - dense = a M + b on this piece
        root = _root(a, b)
        if root is None or not low < root < high:
            if a * inside + b < 0:
                found = found.union(sympy.Interval.open(low, high))
        else:
            found = found.union(sympy.Interval.open(*((low, root) if a > 0 else (root, high))))
    # Pieces meet in points that belong to the set if the rewrite is faster there too.
    difference = device.time(rewrite) - device.time(dense)
    for point in (e for e in ends[1:-1] if difference.subs(M, e) < 0):
        found = found.union(sympy.FiniteSet(point))
    return found


def break_even(dense: Cost, rewrite: Cost, device: Device) -> sympy.Rational | None:
    """The token count above which the rewrite is faster at every count, where there is one.

    None where the rewrite is faster at all counts or slower at arbitrarily large ones; :func:`profitable` tells these
    apart.
    """
    found = profitable(dense, rewrite, device)
    if found is sympy.S.EmptySet or found.sup != sympy.oo:
        return None
    pieces = found.args if isinstance(found, sympy.Union) else (found,)
    last = next(piece for piece in pieces if piece.sup == sympy.oo)
    return None if last.inf == 0 else last.inf


def _line(expression: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(a, b) of ``a M + b``."""
    expression = sympy.expand(expression)
    slope = expression.coeff(M, 1)
    rest = sympy.expand(expression - slope * M)
    if rest.free_symbols or slope.free_symbols:
        raise ConfigError(f"cost: {expression} is not linear in M; give both costs in slope_compile.cost.M")
    return slope, rest


def _root(slope: sympy.Expr, offset: sympy.Expr) -> sympy.Expr | None:
    return None if slope == 0 else -offset / slope


def _time_around(cost: Cost, device: Device, at: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """The line that the time of a cost follows around a count that is not a crossing."""
    slope, offset = sympy.Integer(0), len(cost.works) * _exact(device.launch)
    for work in cost.works:
        a, b = max(map(_line, device._terms(work)), key=lambda line: line[0] * at + line[1])
        slope, offset = slope + a, offset + b
    return slope, offset


def _exact(number: float) -> sympy.Rational:
    """The decimal number that was written, not its binary neighbour."""
    return sympy.Rational(str(number))
