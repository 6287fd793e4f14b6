"""Launches that are remembered lead to what Triton launches itself."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slope_compile.kernels import launching
from slope_compile.kernels.launching import Kernels, Launcher


def test_what_is_launched_again_is_what_triton_launches() -> None:
    """On a GPU that is not there, with the Triton that is installed: every kernel, all that reaches its launch."""
    tests = Path(__file__).parents[1]
    found = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tests / "fake_gpu.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=True, env=os.environ | {"PYTHONPATH": found}
    )
    report = json.loads(done.stdout)
    assert len(report) == 12 + 12
    for name, (first, again) in report.items():
        assert len(first) == 1 + ("columns mma" in name or "columns wgmma" in name or "split" in name), name
        assert first == again, name
    launched = {name: first[0] for name, (first, _) in report.items()}
    assert launched["forward 1"] != launched["forward 40"]
    assert any(text.startswith("tiles") for text in launched["wgmma_sp 40"])


class FakeKernel:
    """Notes how it was launched; what it compiles notes its launches."""

    def __init__(self) -> None:
        def signature(x: Any, n: Any, BLOCK: Any, GROUP: Any = 8) -> None: ...

        self.params = list(inspect.signature(signature).parameters.values())
        self.looked_up: list[Any] = []
        self.launched: list[Any] = []
        self.warmup = "warmup"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.looked_up.append((grid, arguments, options))
            return self

        return launch


class Compiled(FakeKernel):
    packed_metadata = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        if len(grid) < 3:
            return super().__getitem__(grid)
        return lambda *arguments: self.launched.append((grid, arguments))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_device", lambda arguments: 0)


@pytest.mark.usefixtures("on_a_gpu")
def test_the_second_launch_is_remembered() -> None:
    kernel, x = Compiled(), torch.zeros(8)
    launcher = Launcher(kernel)
    for _ in range(3):
        launcher[(5,)](x, 3, BLOCK=16, num_warps=4)
    assert kernel.looked_up == [((5,), (x, 3), {"BLOCK": 16, "num_warps": 4})]
    assert kernel.launched == [((5, 1, 1), (x, 3, 16, 8))] * 2
    launcher[(7, 2)](x, 3, BLOCK=16, num_warps=4)
    assert kernel.launched[-1] == ((7, 2, 1), (x, 3, 16, 8)), "another grid"


@pytest.mark.usefixtures("on_a_gpu")
def test_all_that_triton_may_compile_in_is_looked_up_anew() -> None:
    kernel, x = Compiled(), torch.zeros(64)
    launcher = Launcher(kernel)
    launcher[(1,)](x, 16, BLOCK=16, num_warps=4)
    for argument, n, block, warps in (
        (x.half(), 16, 16, 4), (x[1:], 16, 16, 4), (x, 17, 16, 4), (x, 1, 16, 4), (x, 16, 32, 4), (x, 16, 16, 8),
    ):  # fmt: skip
        before = len(kernel.looked_up)
        launcher[(1,)](argument, n, BLOCK=block, num_warps=warps)
        assert len(kernel.looked_up) == before + 1
    assert not kernel.launched
    launcher[(1,)](torch.ones(64), 16, BLOCK=16, num_warps=4)
    assert len(kernel.launched) == 1, "another tensor of the kind"


def test_another_device_is_looked_up_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Compiled()
    launcher = Launcher(kernel)
    for device in (0, 1, 0):
        monkeypatch.setattr(launching, "_device", lambda arguments, device=device: device)
        launcher[(1,)](torch.zeros(8), 3, BLOCK=16)
    assert len(kernel.looked_up) == 2
    assert len(kernel.launched) == 1


@pytest.mark.usefixtures("on_a_gpu")
def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST", 4)
    launcher = Launcher(Compiled())
    for n in range(10):
        launcher[(1,)](torch.zeros(8), n, BLOCK=16)
        assert len(launcher._known) <= 4


def test_nothing_is_remembered_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and of kernels that are interpreted."""
    kernel = Compiled()
    for _ in range(2):
        Launcher(kernel)[(1,)](torch.zeros(8), 3, BLOCK=16)
    monkeypatch.setattr(launching, "_device", lambda arguments: 0)
    plain = FakeKernel()
    for _ in range(2):
        Launcher(plain)[(1,)](torch.zeros(8), 3, BLOCK=16)
    assert len(kernel.looked_up) == len(plain.looked_up) == 2


def test_other_names_of_a_module_are_what_they_are() -> None:
    kernel = FakeKernel()
    kernels = Kernels(SimpleNamespace(forward=kernel, tiles=len))  # type: ignore[arg-type]
    assert kernels.tiles is len
    assert kernels.forward.kernel is kernel
    assert kernels.forward is kernels.forward
    assert kernels.forward.warmup == "warmup"


def test_the_current_device_needs_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    for device, expected in (("cpu", 0), ("cuda:1", 0), ("cuda:0", 1)):
        launching.device_of(SimpleNamespace(is_cuda=device != "cpu", device=torch.device(device)))  # type: ignore[arg-type]
        assert len(entered) == expected
