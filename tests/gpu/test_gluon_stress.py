"""The stress script: what it says without a GPU or without compute-sanitizer, and a few rounds where there is one."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import gluon_stress
from gluon_cpu import Executor
from slope_compile.kernels import gluon_configs, gluon_products
from slope_compile.kernels.gluon_configs import MMA_SP, WgmmaSp


@pytest.mark.gpu
def test_nothing_differs() -> None:
    assert gluon_stress.stress(torch.device("cuda"), 20) == []


def test_without_a_gpu_nothing_was_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gluon_stress.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_without_the_sanitizer_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gluon_stress, "stress", lambda device, rounds: [])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gluon_stress.main([]) == 2
    assert "compute-sanitizer is not on the path: racecheck, memcheck, synccheck" in capsys.readouterr().out
    assert gluon_stress.main(["--tools"]) == 0
    monkeypatch.setattr(gluon_stress, "stress", lambda device, rounds: ["mma_sp"])
    assert gluon_stress.main(["--tools"]) == 1


def test_each_tool_runs_and_its_findings_count(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=int(command[2] == "memcheck"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gluon_stress, "stress", lambda device, rounds: [])
    monkeypatch.setattr(shutil, "which", lambda name: f"/tools/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    assert gluon_stress.main([]) == 1
    assert [command[:5] for command in commands] == [
        ["/tools/compute-sanitizer", "--tool", tool, "--error-exitcode", "1"] for tool in gluon_stress.TOOLS
    ]
    assert all(command[-1] == "--tools" for command in commands)  # none inside
    assert gluon_stress.main(["--tools", "racecheck"]) == 0


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the executor: the script's own problems, of one small configuration of each kernel."""
    small = WgmmaSp(1, 4, 4, 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gluon_stress, "CONFIGS", (MMA_SP[0], small))
    monkeypatch.setattr(gluon_stress, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(gluon_stress, "sizes", lambda config: (config.BM + 1, config.BN - 8, 256, 24))
    mma, good = Executor("gluon_mma_sp"), Executor("gluon_wgmma_sp")
    monkeypatch.setattr(gluon_products, "_kernels", lambda: mma)
    monkeypatch.setattr(gluon_products, "_wgmma_kernels", lambda: good)
    assert gluon_stress.stress(torch.device("cpu"), 1) == []
    bad = Executor("gluon_wgmma_sp", (("[b0, b1, b2, b3", "[b1, b0, b2, b3"),))
    monkeypatch.setattr(gluon_products, "_wgmma_kernels", lambda: bad)
    assert gluon_stress.stress(torch.device("cpu"), 1) == [f"{small} torch.bfloat16", f"{small} torch.bfloat16 split"]


def test_every_configuration_is_stressed() -> None:
    assert set(gluon_stress.CONFIGS) == {*gluon_configs.MMA_SP, *gluon_configs.WGMMA_SP}
    for config in gluon_stress.CONFIGS:
        M, N, K, _ = gluon_stress.sizes(config)
        assert M % config.BM
        assert N % config.BN
        assert K % 128 == 64
        assert 2 * config.stages < K // 64
