"""A kernel is tested once, by one thread, outside of captures; an untested one is not trusted inside."""

from __future__ import annotations

import concurrent.futures
import threading
import types
from typing import Any

import pytest
import torch

from slope_compile.kernels import (
    few_self_test,
    gluon_choices,
    gluon_configs,
    gluon_self_test,
    gpu_calls,
    gpu_ops,
    gpu_self_test,
    self_tests,
)
from slope_compile.kernels.self_tests import trusted

CUDA = torch.device("cuda", 0)
CASE = (CUDA, torch.float16)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_tests, "_results", {})
    monkeypatch.setattr(self_tests, "_put_off", set())


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """``stream.captured``: whether that of the thread is."""
    state = threading.local()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: getattr(state, "captured", False))
    return state


class Test:
    """One that notes its cases, and may take its time."""

    __test__ = False

    def __init__(self, right: bool = True) -> None:
        self.cases: list[tuple[Any, ...]] = []
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

        def passes(*case: Any) -> bool:
            self.cases.append(case)
            self.begun.set()
            assert self.may_end.wait(60)
            return right

        self.passes = passes


@pytest.mark.parametrize("right", [True, False])
def test_a_capture_tests_nothing(right: bool, stream: threading.local, caplog: pytest.LogCaptureFixture) -> None:
    test = Test(right)
    stream.captured = True
    for _ in range(3):
        assert not trusted(test.passes, *CASE)
    assert not test.cases
    assert caplog.text.count("before the kernels that it wants were tested") == 1, "said once"
    stream.captured = False
    assert trusted(test.passes, *CASE) is right
    stream.captured = True
    assert trusted(test.passes, *CASE) is right, "known by now"
    assert not trusted(test.passes, CUDA, torch.bfloat16), "another dtype is not"
    assert test.cases == [CASE]


def test_results_are_never_forgotten(stream: threading.local) -> None:
    """A case that is known is not tested again, however many others were in between: this may be in a capture."""
    test = Test()
    cases = [(CUDA, torch.float16, size) for size in range(3000)]
    assert all(trusted(test.passes, *case) for case in cases)
    stream.captured = True
    assert all(trusted(test.passes, *case) for case in cases)
    assert test.cases == cases


def test_tests_of_different_kernels_are_told_apart(stream: threading.local) -> None:
    right, wrong = Test(), Test(right=False)
    assert trusted(right.passes, *CASE)
    assert not trusted(wrong.passes, *CASE)
    assert trusted(right.passes, *CASE)


def test_threads_wait_for_a_test_and_captures_do_not(stream: threading.local) -> None:
    test = Test()
    test.may_end.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(trusted, test.passes, *CASE)
        assert test.begun.wait(60)
        second = pool.submit(trusted, test.passes, *CASE)

        def capturing() -> bool:
            stream.captured = True
            return trusted(test.passes, *CASE)

        assert not pool.submit(capturing).result(60), "begun is not ended"
        assert not first.done()
        assert not second.done()
        test.may_end.set()
        assert first.result(60)
        assert second.result(60)
        assert pool.submit(capturing).result(60)
    assert test.cases == [CASE]


def test_a_test_that_raises_is_not_known(stream: threading.local) -> None:
    def passes(*case: Any) -> bool:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        trusted(passes, *CASE)
    stream.captured = True
    assert not trusted(passes, *CASE)


def test_whoever_wants_a_kernel_asks_here(stream: threading.local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators, compiled graphs and calls of every way: nothing is tested while a stream is captured."""

    def tested(*case: Any) -> bool:
        raise AssertionError(case)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_ops, "available", lambda device: True)
    for module in (gpu_self_test, gluon_self_test, few_self_test):
        monkeypatch.setattr(module, "passes", tested)
    stream.captured = True
    x = types.SimpleNamespace(device=CUDA, dtype=torch.float16)
    assert not gpu_ops.usable(2, 4, x)  # type: ignore[arg-type]
    assert not gpu_ops.ready(CUDA, torch.float16)
    assert gluon_choices.choices(64, 64, 64, 0, CUDA, torch.float16) == ()
    for way, name in (("few", ""), ("mma_sp", ""), ("wgmma_sp", str(gluon_configs.WGMMA_SP[0]))):
        assert not gpu_calls.can(way, "forward", 8, 64, 64, torch.float16, CUDA, 0, name)
        assert not gpu_calls.can(way, "grad_input_columns", 8, 64, 64, torch.float16, CUDA, 0, name)
