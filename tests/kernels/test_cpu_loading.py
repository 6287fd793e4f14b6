"""The CPU kernels are loaded in a thread of their own, whatever the thread that asks for them has switched on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from slope_compile.kernels import cpu_library
from slope_compile.kernels.cpu_library import CpuLibrary

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the CPU kernels need g++ or clang++")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> CpuLibrary:
    """The library of this machine, in a process that seems to have loaded nothing."""
    found = cpu_library.load()
    if found is None:
        pytest.skip("no CPU kernels on this machine")
    monkeypatch.setattr(cpu_library, "_loader", cpu_library._Loader())
    return found


@pytest.mark.parametrize("switched_on", [
    pytest.param(lambda: torch.autocast("cpu", dtype=torch.bfloat16), id="autocast"),
    pytest.param(lambda: torch.device("meta"), id="default device"),
    pytest.param(FakeTensorMode, id="fake tensors"),
    pytest.param(lambda: FlopCounterMode(display=False), id="counter"),
])  # fmt: skip
def test_loading_sees_nothing_that_the_caller_has_switched_on(
    switched_on: Callable[[], AbstractContextManager[object]],
    library: CpuLibrary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.Tensor] = []

    def find(requested: str | None) -> CpuLibrary:
        made.append(torch.ones(2, 2) @ torch.ones(2, 2))
        return library

    monkeypatch.setattr(cpu_library, "_find", find)
    with switched_on() as context:
        assert cpu_library.load() is library
    (tensor,) = made
    assert type(tensor) is torch.Tensor
    assert (tensor.device.type, tensor.dtype) == ("cpu", torch.float32)
    assert not isinstance(context, FlopCounterMode) or context.get_total_flops() == 0


def test_loading_inside_a_transformation(library: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real self-test, which draws random numbers and reads addresses."""
    for transform in (torch.vmap, torch.func.grad):
        monkeypatch.setattr(cpu_library, "_loader", cpu_library._Loader())
        found: list[CpuLibrary | None] = []

        def function(x: torch.Tensor, found: list[CpuLibrary | None] = found) -> torch.Tensor:
            found.append(cpu_library.load())
            return x.sum()

        transform(function)(torch.ones(3))
        assert [each and each.isa for each in found] == [library.isa]


def test_a_failure_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu_library.VARIABLE, raising=False)
    monkeypatch.setattr(cpu_library, "_loader", cpu_library._Loader())
    failures = [OSError("no memory"), OSError("no memory")]

    def find(requested: str | None) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(cpu_library, "_find", find)
    cpu_library.start_loading()
    thread = cpu_library._loader.thread
    assert thread is not None
    thread.join(60)
    with pytest.raises(OSError, match="no memory"):
        cpu_library.load()
    assert failures == []
    assert cpu_library.load() is None


def test_a_process_that_ends_during_the_self_test_ends_in_order(library: CpuLibrary) -> None:
    code = """
import sys, threading, time
from slope_compile.kernels import cpu_library

real, begun, rounds = cpu_library.self_test, threading.Event(), []

def slow(library):
    begun.set()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        rounds.append(real(library))
    sys.stderr.write(f"ended after {len(rounds) > 0}")

cpu_library.self_test = slow
cpu_library.start_loading()
assert begun.wait(300)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "ended after True")


def test_no_self_test_begins_in_a_process_that_ends(library: CpuLibrary) -> None:
    cpu_library._loader.leave()
    with pytest.raises(SystemExit, match="the process ends"):
        cpu_library.load()
