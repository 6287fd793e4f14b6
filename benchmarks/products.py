"""The products of one linear layer, dense and 2:4, on rotating cold weights: what layer benchmarks time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import rotation
from benchmarks.cases import DTYPES
from benchmarks.timing import Contender
from slope_compile.kernels import metadata, ops, reference
from slope_compile.kernels.masks import magnitude_mask, random_mask
from slope_compile.pattern import Pattern

NM = Pattern(2, 4)
KEEP_GROUP = (NM.keep, NM.group)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error of a product, as a share of its largest entry; a benchmark of wrong numbers is worth nothing."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight in all its forms; the dense one has numbers of its own."""

    dense: Tensor
    values: Tensor
    pattern: Tensor
    column_mask: Tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """One linear layer: ``M`` tokens, weight ``[N, K]``."""

    M: int
    N: int
    K: int
    dtype: str
    device: torch.device
    weights: list[Weight]
    """Random numbers, of their own in each form: a dense product with zeros in it draws less power."""
    x: Tensor
    grad: Tensor

    @classmethod
    def draw(
        cls, M: int, N: int, K: int, dtype: str, device: torch.device, seed: int = 0, copies: int | None = None
    ) -> Problem:
        """Random numbers; as many copies of the weight as a cache does not hold, unless their number is given."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])

        pattern = metadata.pack_mask(_mask(N, K, seed, device)).to(device)
        values = normal(N, K // 2)
        column_mask = ops.pick_columns(values, pattern, *KEEP_GROUP)
        weights = [Weight(normal(N, K), values, pattern, column_mask)]
        smallest = values.nbytes + pattern.nbytes
        count = rotation.copies(smallest, rotation.cache_bytes(device)) if copies is None else copies
        for _ in range(count - 1):
            # The same positions in memory of their own; drawing masks anew would take longer than the measurement.
            weights.append(Weight(normal(N, K), normal(N, K // 2), pattern.clone(), column_mask.clone()))
        return cls(M, N, K, dtype, device, weights, normal(M, K), normal(M, N))

    @property
    def facts(self) -> dict[str, Any]:
        """For the record."""
        weight = self.weights[0]
        return {
            "shape": {"M": self.M, "N": self.N, "K": self.K},
            "dtype": self.dtype,
            "copies": len(self.weights),
            "dense_bytes": weight.dense.nbytes,
            "sparse_bytes": weight.values.nbytes + weight.pattern.nbytes,
        }

    def products(self, compiled: dict[str, Any] | None = None) -> dict[str, dict[str, Contender]]:
        """Product -> contender -> what is timed.

        Args:
            compiled: options of ``torch.compile`` for the dense contender "compiled".
        """
        weights, x, grad = self.weights, self.x, self.grad
        dense = [weight.dense for weight in weights]
        count = len(weights)
        options = compiled or {}
        forward, grad_input, grad_weight = (
            torch.compile(product, fullgraph=True, dynamic=False, **options)
            for product in (forward_product, grad_input_product, grad_weight_product)
        )

        def ours(product: Callable[[Weight], object]) -> Contender:
            return lambda i: product(weights[i % count])

        return {
            "forward": {
                "dense": lambda i: forward_product(x, dense[i % count]),
                "compiled": lambda i: forward(x, dense[i % count]),
                "slope": ours(lambda w: ops.linear(x, w.values, w.pattern, None, *KEEP_GROUP)),
            },
            "grad_input": {
                "dense": lambda i: grad_input_product(grad, dense[i % count]),
                "compiled": lambda i: grad_input(grad, dense[i % count]),
                "slope_exact": ours(lambda w: ops.grad_input(grad, w.values, w.pattern, *KEEP_GROUP)),
                "slope_double_pruned": ours(lambda w: double_pruned_product(grad, w)),
            },
            "grad_weight": {
                "dense": lambda i: grad_weight_product(grad, x),
                "compiled": lambda i: grad_weight(grad, x),
                "slope": ours(lambda w: ops.grad_weight(grad, x, w.pattern, *KEEP_GROUP)),
            },
        }

    def columns(self) -> dict[str, Contender]:
        """The second compression: picking the columns, and the transpose of those that were picked before.

        The contender "copy" reads and writes the dense weight once, as a measure of what memory allows.
        """
        weights, count = self.weights, len(self.weights)
        target = torch.empty_like(weights[0].dense)

        def pick(i: int) -> object:
            w = weights[i % count]
            return ops.pick_columns(w.values, w.pattern, *KEEP_GROUP)

        def compress(i: int) -> object:
            w = weights[i % count]
            return ops.compress_columns(w.values, w.pattern, *KEEP_GROUP, w.column_mask)

        return {
            "copy": lambda i: target.copy_(weights[i % count].dense),
            "pick_columns": pick,
            "compress_columns": compress,
        }

    def truths(self) -> dict[str, Tensor]:
        """Each product in float32, from the first weight: dense ones, and ``grad_weight`` at the kept positions."""
        w = self.weights[0]
        expanded = ops.expand(w.values, w.pattern, *KEEP_GROUP)
        dense, x, grad = (tensor.float() for tensor in (expanded, self.x, self.grad))
        twice = ops.expand(reference.keep_columns(w.values, w.column_mask), w.pattern, *KEEP_GROUP).float()
        grad_weight = grad_weight_product(grad, x)
        return {
            "forward": forward_product(x, dense),
            "grad_input": grad_input_product(grad, dense),
            "grad_input_double_pruned": grad_input_product(grad, twice),
            "grad_weight": grad_weight,
            "grad_weight_kept": ops.compress(grad_weight, w.pattern, *KEEP_GROUP),
        }

    def errors(self) -> dict[str, float]:
        """Largest error of each product of ours, as a share of its largest entry, against float32 on the same numbers.

        Raises:
            ArithmeticError: an error exceeds the tolerance.
        """
        return own_errors(self.products(), self.truths(), DTYPES[self.dtype])


def _mask(N: int, K: int, seed: int, device: torch.device) -> Tensor:
    """A random keep mask; on a GPU by its magnitudes of random numbers, since the library draws masks on the CPU."""
    if device.type == "cpu":
        return random_mask(N, K, NM, seed, "benchmark")
    generator = torch.Generator(device).manual_seed(seed)
    return magnitude_mask(torch.rand(N, K, generator=generator, device=device), NM)


def own_errors(
    products: dict[str, dict[str, Contender]], truths: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """See :meth:`Problem.errors`."""
    errors = {
        "forward": error_of(products["forward"]["slope"](0), truths["forward"]),
        "grad_input_exact": error_of(products["grad_input"]["slope_exact"](0), truths["grad_input"]),
        "grad_input_double_pruned": error_of(
            products["grad_input"]["slope_double_pruned"](0), truths["grad_input_double_pruned"]
        ),
        "grad_weight": error_of(products["grad_weight"]["slope"](0), truths["grad_weight_kept"]),
    }
    limit = TOLERANCE[dtype]
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong:
        raise ArithmeticError(f"errors above {limit}: {wrong}")
    return errors


STEPS: dict[str, Sequence[tuple[str, str]]] = {
    "dense": [("forward", "dense"), ("grad_input", "dense"), ("grad_weight", "dense")],
    "compiled": [("forward", "compiled"), ("grad_input", "compiled"), ("grad_weight", "compiled")],
    "slope_exact": [("forward", "slope"), ("grad_input", "slope_exact"), ("grad_weight", "slope")],
    "slope_double_pruned": [("forward", "slope"), ("grad_input", "slope_double_pruned"), ("grad_weight", "slope")],
}
"""Contender -> the (product, contender) pairs of its forward and backward pass."""


def forward_product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def grad_input_product(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(grad, weight)


def grad_weight_product(grad: Tensor, x: Tensor) -> Tensor:
    return torch.mm(grad.t(), x)


def double_pruned_product(grad: Tensor, weight: Weight) -> Tensor:
    """Input gradient with the columns that were picked before, as a training step computes it."""
    w = weight
    product: Tensor = ops.grad_input_columns(grad, w.values, w.pattern, w.column_mask, *KEEP_GROUP)
    return product


def error_of(actual: object, expected: Tensor) -> float:
    """Largest difference, as a share of the largest entry of ``expected``."""
    assert isinstance(actual, Tensor)
    return float((actual.float() - expected).abs().max() / expected.abs().max())
