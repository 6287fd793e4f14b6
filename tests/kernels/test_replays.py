"""Calls that are replayed give what the product gives; calls that are more than launches are never replayed."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_compile.kernels import _replays, launching
from slope_compile.kernels._replays import ATTEMPTS, Replays
from slope_compile.kernels.launching import Launcher


@dataclasses.dataclass
class Tiles:
    """A descriptor of tiles, as the kernels get it."""

    base: Tensor
    block_shape: tuple[int, ...]
    layout: str = "rows"


class Kernel:
    """In the place of a Triton kernel and of what it compiles to: ``y = x * by``, of tensors or of tiles.

    Like a kernel on a GPU it takes no more than an address from what it is given.
    """

    def __init__(self) -> None:
        def signature(x: Any, y: Any, by: Any, TWICE: Any) -> None: ...

        self.params = list(inspect.signature(signature).parameters.values())
        self.warmup = None
        self.packed_metadata: tuple[int, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Kernel]:
        def launch(x: Any, y: Tensor, by: int, TWICE: bool, num_warps: int = 4) -> Kernel:
            source = x.base if isinstance(x, Tiles) else x
            length = grid[0]
            at = torch.as_strided(source, (length,), (1,))
            torch.as_strided(y, (length,), (1,)).copy_(at * (2 * by if TWICE else by))
            return self

        def hidden(*arguments: Any, **options: Any) -> Kernel:
            # What a kernel does is no operator of PyTorch.
            with torch.utils._python_dispatch._disable_current_modes():
                return launch(*arguments, **options)

        return hidden


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_device", lambda arguments: 0)


class Product:
    """``out = x * 12`` in two launches with scratch memory in between; counts how often it is called."""

    def __init__(self) -> None:
        self.launcher = Launcher(Kernel())
        self.called = 0

    def __call__(self, x: Tensor, unused: Tensor | None, out: Tensor, way: str = "way") -> Tensor:
        self.called += 1
        n = x.numel()
        between = x.new_empty(n)
        self.launcher[(n,)](Tiles(x.t(), (2, 2)), between, 2, TWICE=True, num_warps=4)
        self.launcher[(n,)](between.view(torch.int32).view(torch.float32), out, 3, TWICE=False, num_warps=4)
        return out


def numbers(*size: int) -> Tensor:
    return torch.randn(*size)


def test_other_operands_of_the_kind() -> None:
    replays, product = Replays(), Product()
    for _ in range(4):
        x, out = numbers(3, 4), torch.full((3, 4), -7.0)
        before = x.clone()
        assert replays.call(product, (x, None, out), "way") is out
        assert torch.equal(out, 12 * before)
        assert torch.equal(x, before)
    assert product.called == 1


def test_another_kind_is_called() -> None:
    replays, product = Replays(), Product()
    x, out = numbers(3, 4), torch.empty(3, 4)
    replays.call(product, (x, None, out), "way")
    others: list[tuple[tuple[Tensor | None, ...], str]] = [
        ((numbers(4, 4), None, torch.empty(4, 4)), "way"),
        ((numbers(4, 3), None, torch.empty(3, 4)), "way"),
        ((numbers(4, 3), None, torch.empty(4, 3).t()), "way"),  # another stride
        ((numbers(13)[1:].view(3, 4), None, out), "way"),  # another alignment
        ((x, numbers(1), out), "way"),
        ((x, numbers(1).half(), out), "way"),
        ((x, None, out), "another way"),
    ]
    for count, (operands, way) in enumerate(others, 2):
        given = operands[0]
        assert given is not None
        replays.call(product, operands, way)
        assert product.called == count
        result = operands[-1]
        assert result is not None
        if result.is_contiguous():
            assert torch.equal(result.reshape(-1), 12 * given.reshape(-1))
    replays.call(Product(), (x, None, out), "way")
    replays.call(product, (x, None, out), "way")
    assert product.called == 1 + len(others)


def test_a_kind_that_is_another_to_pytorch_alone() -> None:
    """Parameters, and tensors that want gradients, are at an address as others are."""
    replays, product = Replays(), Product()
    for given in (torch.nn.Parameter(numbers(4)), numbers(4), numbers(4).requires_grad_()):
        out = torch.empty(4)
        with torch.no_grad():
            replays.call(product, (given, None, out))
        assert torch.equal(out, 12 * given)
    assert product.called == 1


class Copies(Product):
    def __call__(self, x: Tensor, unused: Tensor | None, out: Tensor, way: str = "way") -> Tensor:
        return super().__call__(x.clone(), unused, out)


class Adds(Product):
    def __call__(self, x: Tensor, unused: Tensor | None, out: Tensor, way: str = "way") -> Tensor:
        return super().__call__(x, unused, out).add_(x)


class Inside(Product):
    """Passes a part of its operand that does not begin where that does."""

    def __call__(self, x: Tensor, unused: Tensor | None, out: Tensor, way: str = "way") -> Tensor:
        self.called += 1
        half = x.shape[0] // 2
        self.launcher[(half,)](x[half:], out[:half], 1, TWICE=False)
        self.launcher[(half,)](x[:half], out[half:], 1, TWICE=False)
        return out


class Returns(Product):
    """Gives its result in a tensor of its own."""

    def __call__(self, x: Tensor, unused: Tensor | None, out: Tensor, way: str = "way") -> Tensor:
        return super().__call__(x, unused, x.new_empty(x.shape))


class Foreign(Product):
    """Launches a kernel that Triton has to look up each time."""

    def __init__(self) -> None:
        super().__init__()
        del self.launcher.kernel.packed_metadata


class Strided(Product):
    """Its scratch memory has gaps."""

    def __call__(self, x: Tensor, unused: Tensor | None, out: Tensor, way: str = "way") -> Tensor:
        x.new_empty_strided((2, 2), (4, 2))
        return super().__call__(x, unused, out)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Copies, lambda x: 12 * x),
        (Adds, lambda x: 12 * x + x),
        (Inside, lambda x: x.roll(2)),
        (Returns, lambda x: 12 * x),
        (Foreign, lambda x: 12 * x),
        (Strided, lambda x: 12 * x),
    ],
)
def test_what_is_never_replayed(kind: type[Product], expected: Callable[[Tensor], Tensor]) -> None:
    replays, product = Replays(), kind()
    for count in range(1, ATTEMPTS + 4):
        x, out = numbers(4), torch.empty(4)
        assert torch.equal(replays.call(product, (x, None, out)), expected(x))
        assert product.called == count
    assert not launching.watched()


def test_operands_at_one_address_are_not_told_apart() -> None:
    """A call in which two operands share memory says nothing of one in which they do not."""
    replays, product = Replays(), Product()
    x = numbers(4)
    expected = 12 * x
    replays.call(product, (x, None, x))
    assert torch.equal(x, expected)
    x, out = numbers(4), torch.zeros(4)
    replays.call(product, (x, None, out))
    assert torch.equal(out, 12 * x)
    assert product.called == 2
    shared = numbers(4)
    expected = 12 * shared
    replays.call(product, (shared, None, shared))  # the other way round all is well
    assert torch.equal(shared, expected)


def test_a_first_call_with_more_to_do_is_tried_again() -> None:
    """Kernels are tested at their first call, which uses operators of PyTorch."""
    replays, product = Replays(), Product()

    def tested_first(x: Tensor, unused: Tensor | None, out: Tensor) -> Tensor:
        if not product.called:
            torch.randn(3).sum()
        return product(x, unused, out)

    for _ in range(4):
        x, out = numbers(4), torch.empty(4)
        assert torch.equal(replays.call(tested_first, (x, None, out)), 12 * x)
    assert product.called == 2


def test_a_call_inside_of_a_call() -> None:
    """What the inner one repeats, the outer one has to see too."""
    replays, product = Replays(), Product()
    replays.call(product, (numbers(4), None, torch.empty(4)))
    outside = 0

    def outer(x: Tensor, out: Tensor) -> Tensor:
        nonlocal outside
        outside += 1
        return replays.call(product, (x, None, out))

    for _ in range(3):
        x, out = numbers(4), torch.empty(4)
        assert torch.equal(replays.call(outer, (x, out)), 12 * x)
    assert outside == 1


def test_an_error_leaves_nothing_behind() -> None:
    replays, product = Replays(), Product()
    broken = True

    def fails(x: Tensor, unused: Tensor | None, out: Tensor) -> Tensor:
        result = product(x, unused, out)
        if broken:
            raise ValueError("after its launches")
        return result

    for _ in range(ATTEMPTS + 1):
        with pytest.raises(ValueError, match="after its launches"):
            replays.call(fails, (numbers(4), None, torch.empty(4)))
        assert not launching.watched()
    broken = False
    for _ in range(2):
        x, out = numbers(4), torch.empty(4)
        assert torch.equal(replays.call(fails, (x, None, out)), 12 * x)
    assert product.called == ATTEMPTS + 2


def test_no_memory_is_kept() -> None:
    made = []

    class Remembering(Product):
        def __call__(self, x: Tensor, unused: Tensor | None, out: Tensor, way: str = "way") -> Tensor:
            scratch = x.new_empty(4)
            made.append(weakref.ref(scratch))
            self.launcher[(4,)](Tiles(x, (2,)), scratch, 1, TWICE=False)
            self.launcher[(4,)](scratch, out, 1, TWICE=False)
            return out

    replays, product = Replays(), Remembering()
    x, out = numbers(4), torch.empty(4)
    references = [weakref.ref(x), weakref.ref(out)]
    for _ in range(2):
        replays.call(product, (x, None, out))
    assert len(made) == 1
    del x, out
    gc.collect()
    assert not any(reference() is not None for reference in references + made)


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replays, "MOST", 4)
    replays, product = Replays(), Product()
    for n in range(1, 11):
        x, out = numbers(n), torch.empty(n)
        assert torch.equal(replays.call(product, (x, None, out)), 12 * x)
        assert len(replays._known) <= 4
