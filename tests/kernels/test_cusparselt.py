"""cuSPARSELt's wrapper, against stand-ins for PyTorch's primitives that misbehave as the real ones were seen to."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fake_cusparselt import FAST, SLOW, TWO_FOUR, Misbehaving
from problems import Shape, draw
from slope_compile.kernels import _cusparselt, cache_files, gpu_calls, reference
from slope_compile.kernels._cusparselt import Algorithm, Packed

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Misbehaving]:
    fake = Misbehaving()
    monkeypatch.setattr(_cusparselt, "primitives", fake)
    monkeypatch.setattr(cache_files, "cache_folder", lambda: tmp_path)
    _cusparselt.in_place.cache_clear()
    _cusparselt.known.cache_clear()
    monkeypatch.setattr(_cusparselt, "_thread", _cusparselt._Thread())
    yield fake
    _cusparselt.known.cache_clear()


both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@both_dtypes
def test_what_was_stored_is_found_and_nothing_is_tried(fake: Misbehaving, dtype: torch.dtype) -> None:
    product = (dtype, 32, 48, 64)
    assert _cusparselt.algorithm(CPU, *product) is None
    _cusparselt.store(CPU, product, [Algorithm(FAST), Algorithm(SLOW, 2, 1)])
    assert _cusparselt.algorithm(CPU, *product) == Algorithm(FAST)
    # Another process reads it from the file, beside what others found.
    _cusparselt.store(CPU, (dtype, 16, 48, 64), [])
    _cusparselt.known.cache_clear()
    assert _cusparselt.known(CPU) == {product: (Algorithm(FAST), Algorithm(SLOW, 2, 1)), (dtype, 16, 48, 64): ()}
    # Other sizes and dtypes know nothing of it.
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    for unknown in ((dtype, 16, 48, 64), (dtype, 48, 48, 64), (dtype, 32, 64, 64), (other, 32, 48, 64)):
        assert _cusparselt.algorithm(CPU, *unknown) is None
    assert fake.calls == fake.packs == 0


def test_another_library_or_gpu_knows_nothing(fake: Misbehaving, tmp_path: Path) -> None:
    product = (torch.float16, 32, 48, 64)
    _cusparselt.store(CPU, product, [Algorithm(FAST)])
    for change in ("installed", "name"):
        _cusparselt.known.cache_clear()
        setattr(fake, change, 900 if change == "installed" else lambda device: "another GPU")
        assert _cusparselt.algorithm(CPU, *product) is None
        _cusparselt.store(CPU, product, [Algorithm(SLOW)])
    assert len(list(tmp_path.glob("cusparselt-*.json"))) == 3


def test_without_a_verified_algorithm_the_library_is_not_called(
    fake: Misbehaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not without a search, nor for other token counts of the same weight, nor if no algorithm is right."""

    def called(*_: object) -> Tensor:
        raise AssertionError("called with what nobody verified")

    p = draw(TWO_FOUR, Shape((32,), 48, 16), torch.float16)
    monkeypatch.setattr(fake, "product", called)
    monkeypatch.setattr(_cusparselt, "unfit", lambda *_: None)
    nobody = "no algorithm was verified for these sizes; slope-compile tune --device cuda searches"
    none = "no algorithm of the library is right"
    for tokens, found, why in ((32, None, nobody), (64, [Algorithm(FAST)], nobody), (32, [], none)):
        if found is not None:
            _cusparselt.store(CPU, (torch.float16, tokens, 48, 64), found)
        assert why in str(_cusparselt.missing(CPU, torch.float16, 32, 48, 64))
        with pytest.raises(ValueError, match="no algorithm"):
            _cusparselt.linear(p.x, p.values, p.pattern)
        with pytest.raises(ValueError, match="no algorithm was verified"):
            _cusparselt.product(p.x, p.x, 48, 64)
        if found is None:
            with pytest.raises(ValueError, match="no algorithm was verified"):
                Packed(p.values, p.pattern)
        assert not gpu_calls.can("cusparselt", "forward", 32, 48, 64, torch.float16, CPU)
    packed = Packed(p.values, p.pattern)  # for which 64 tokens have one
    with pytest.raises(ValueError, match="no algorithm was verified"):
        packed.linear(p.x)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", *(f'{{"{name}": {found}}}' for name, found in (
        ("float16 32 48 64", 1), ("float16 32 48", []), ("float8 1 2 3", []), ("float16 1 2 3", '[["x"]]')
    ))],
)  # fmt: skip
def test_a_broken_file_is_reported(fake: Misbehaving, text: str, caplog: pytest.LogCaptureFixture) -> None:
    _cusparselt._path(CPU).write_text(text)
    assert _cusparselt.algorithm(CPU, torch.float16, 32, 48, 64) is None
    assert "cannot be read" in caplog.text
    _cusparselt.store(CPU, (torch.float16, 32, 48, 64), [Algorithm(FAST)])
    assert json.loads(_cusparselt._path(CPU).read_text()) == {"float16 32 48 64": [[FAST, 1, -1]]}


@both_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "broadcast"])
def test_any_layout_of_the_activations(fake: Misbehaving, layout: str, dtype: torch.dtype) -> None:
    """The primitive silently misreads a matrix that is not contiguous."""
    _cusparselt.store(CPU, (dtype, 32, 48, 64), [Algorithm(FAST)])
    p = draw(TWO_FOUR, Shape((32,), 48, 16, layout), dtype)
    packed = _cusparselt.pack(p.values, p.pattern)
    for bias in (None, p.bias):
        expected = reference.forward(p.x.contiguous(), p.values, p.pattern, bias, 2, 4)
        assert torch.equal(_cusparselt.product(p.x, packed, 48, 64, bias), expected)


@pytest.mark.parametrize("size", [(32, 60), (60,), (2, 32, 64)])
def test_a_wrong_number_of_features_is_an_error(fake: Misbehaving, size: tuple[int, ...]) -> None:
    p = draw(TWO_FOUR, Shape((32,), 48, 16), torch.float16)
    packed = _cusparselt.pack(p.values, p.pattern)
    with pytest.raises(ValueError, match=r"x must be \[M, 64\]"):
        _cusparselt.product(torch.ones(size, dtype=torch.float16), packed, 48, 64)


def test_what_is_missing_is_named(fake: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cusparselt, "algorithm", lambda *_: Algorithm(FAST))
    half = torch.bfloat16
    assert _cusparselt.missing(DEVICE, half, 32, 48, 64) is None
    assert "not on cpu" in str(_cusparselt.missing(CPU, half, 32, 48, 64))
    assert "not torch.float32" in str(_cusparselt.missing(DEVICE, torch.float32, 32, 48, 64))
    wrong = {(8, 48, 64): "'M': 8", (32, 40, 64): "'N': 40", (32, 48, 68): "'K': 68", (0, 48, 64): "'M': 0"}
    for sizes, named in wrong.items():
        assert named in str(_cusparselt.missing(DEVICE, half, *sizes))
    monkeypatch.setattr(fake, "capability", lambda device: (7, 5))
    assert "(7, 5)" in str(_cusparselt.missing(DEVICE, half, 32, 48, 64))
    fake.installed = None
    assert "without cuSPARSELt" in str(_cusparselt.missing(DEVICE, half, 32, 48, 64))


def test_a_thread_calls_the_library_on_one_device(fake: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handle was made there; other threads, as autograd has one for each device, have their own."""
    monkeypatch.setattr(_cusparselt, "unfit", lambda *_: None)
    p = draw(TWO_FOUR, Shape((32,), 48, 16), torch.float16)
    _cusparselt.store(CPU, (torch.float16, 32, 48, 64), [Algorithm(FAST)])
    _cusparselt.store(DEVICE, (torch.float16, 32, 48, 64), [Algorithm(FAST)])

    def missing(device: torch.device) -> str | None:
        return _cusparselt.missing(device, torch.float16, 32, 48, 64)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(missing, DEVICE).result() is None
        pool.submit(_cusparselt.linear, p.x, p.values, p.pattern).result()
        assert pool.submit(missing, CPU).result() is None
        assert "handle of this thread is for cpu, not for cuda:0" in str(pool.submit(missing, DEVICE).result())
        assert not pool.submit(gpu_calls.can, "cusparselt", "forward", 32, 48, 64, torch.float16, DEVICE).result()
        elsewhere = torch.empty(48, 32, dtype=torch.float16, device="meta")
        before = fake.packs
        with pytest.raises(ValueError, match="not for meta"):
            pool.submit(_cusparselt.pack, elsewhere, p.pattern).result()
        assert fake.packs == before
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(missing, DEVICE).result() is None


@both_dtypes
@pytest.mark.parametrize("in_order", [True, False])
def test_a_kept_operand_follows_its_values(fake: Misbehaving, in_order: bool, dtype: torch.dtype) -> None:
    """By a copy into place where the order is ours, else packed anew; at the same address either way."""
    fake.in_order = in_order
    _cusparselt.store(CPU, (dtype, 32, 48, 64), [Algorithm(FAST)])
    p = draw(TWO_FOUR, Shape((32,), 48, 16), dtype)
    assert _cusparselt.in_place(CPU, dtype) is in_order
    packed = Packed(p.values, p.pattern)
    address, before = packed.buffer.data_ptr(), fake.packs
    for _ in range(3):
        p.values.mul_(1.5).add_(0.25)
        packed.refresh(p.values, p.pattern)
        assert torch.equal(packed.linear(p.x), reference.forward(p.x, p.values, p.pattern, None, 2, 4))
    assert packed.buffer.data_ptr() == address
    assert fake.packs == before + (0 if in_order else 3)
    packs = fake.packs
    packed.refresh(p.values, p.pattern)
    assert fake.packs == packs
    packed.refresh(p.values, p.pattern, always=True)
    assert fake.packs == packs + (0 if in_order else 1)


def test_a_packed_operand_is_not_kept_by_itself(fake: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cusparselt, "unfit", lambda *_: None)
    _cusparselt.store(CPU, (torch.float16, 32, 48, 64), [Algorithm(FAST)])
    p = draw(TWO_FOUR, Shape((32,), 48, 16), torch.float16)
    for _ in range(2):
        before = fake.packs
        _cusparselt.linear(p.x, p.values, p.pattern, p.bias)
        p.values.add_(1.0)  # the next call sees it
    assert fake.packs == before + 1
    expected = reference.forward(p.x, p.values, p.pattern, p.bias, 2, 4)
    assert torch.equal(_cusparselt.linear(p.x, p.values, p.pattern, p.bias), expected)
