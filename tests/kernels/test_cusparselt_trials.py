"""The process that tries cuSPARSELt's algorithms, its conversation in this one."""

from __future__ import annotations

import io
import json
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_cusparselt import (
    COUNT,
    ERRATIC,
    FAST,
    FLUSHING,
    LEAKY,
    REFUSED,
    SILENT,
    SLOW,
    UNBIASED,
    Clock,
    Misbehaving,
)  # fmt: skip
from slope_compile.kernels import _cusparselt
from slope_compile.kernels.cusparselt_trials import Trials, serve

CPU = torch.device("cpu")
PRODUCT = {"product": ["float16", 32, 48, 64]}
IDS = (SILENT, ERRATIC, REFUSED, UNBIASED, LEAKY, FLUSHING, SLOW, FAST)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Misbehaving:
    fake = Misbehaving()
    monkeypatch.setattr(_cusparselt, "primitives", fake)
    return fake


def tried(alg_id: int) -> dict[str, Any]:
    return {"try": [alg_id, 1, -1]}


def test_only_what_is_right_is_timed(fake: Misbehaving) -> None:
    requests = [PRODUCT, {"suggest": True}, *map(tried, IDS)]
    written = io.StringIO()
    serve(Clock(CPU), map(json.dumps, requests), written)
    hello, ready, suggested, *outcomes = map(json.loads, written.getvalue().splitlines())
    assert hello == {"identity": list(_cusparselt.identity(CPU))}
    assert ready == {"ready": True}
    assert suggested == {"algorithm": [ERRATIC, 1, -1], "count": COUNT}
    assert [next(iter(outcome)) for outcome in outcomes] == (
        ["wrong", "wrong", "refused", "wrong", "wrong", "wrong", "seconds", "seconds"]
    )
    assert outcomes[0]["wrong"] == outcomes[4]["wrong"] == "off by nan"
    assert outcomes[5]["wrong"] == "a weight that is NaN is lost"
    assert "NOT_SUPPORTED" in outcomes[2]["refused"]
    assert [outcome["seconds"] for outcome in outcomes[-2:]] == [2.0, 1.0]
    assert all(outcome["host"] > 0 for outcome in outcomes[-2:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_may_be_long(fake: Misbehaving, dtype: str) -> None:
    trials = Trials(Clock(CPU))
    trials.answer({"product": [dtype, 16, 16, 4096]})
    assert trials.answer(tried(FAST))["seconds"] == 1.0
    assert "wrong" in trials.answer(tried(SILENT))


def test_memory_is_given_back(fake: Misbehaving) -> None:
    trials = Trials(Clock(CPU))
    trials.answer(PRODUCT)
    drawn = [weakref.ref(tensor) for tensors in trials._drawn for tensor in tensors]
    assert trials.answer({"release": True}) == {"ready": True}
    assert len(drawn) == 8
    assert not any(tensor() is not None for tensor in drawn)
    assert trials.answer(PRODUCT) == {"ready": True}
    assert "seconds" in trials.answer(tried(FAST))


def test_want_of_memory_is_told_apart(fake: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(dense: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(fake, "compress", compress)
    trials = Trials(Clock(CPU))
    assert trials.answer(PRODUCT) == {"memory": "2 GiB"}
    assert "refused" in trials.answer(tried(FAST))


def test_a_broken_device_is_no_answer(fake: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal instruction may show at an id's own call, which fails then, or when all is waited for."""

    class Broken(Clock):
        def wait(self) -> None:
            raise RuntimeError("an illegal instruction was encountered")

    for alg_id in (FAST, REFUSED):
        trials = Trials(Clock(CPU))
        trials.answer(PRODUCT)
        monkeypatch.setattr(trials, "_gpu", Broken(CPU))
        with pytest.raises(RuntimeError, match="illegal instruction"):
            trials.answer(tried(alg_id))
