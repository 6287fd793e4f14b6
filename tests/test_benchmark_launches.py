"""The launches for a profiler: which there are, without a GPU to launch them on."""

from __future__ import annotations

import pytest
import torch

from benchmarks import launches
from slope_compile.kernels import few_tokens, gluon_products, triton_products


def test_without_a_gpu_nothing_is_launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launches.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("capability", "wgmma"), [((9, 0), True), ((8, 0), False)])
def test_each_kernel_is_launched_that_the_device_has(
    capability: tuple[int, int], wgmma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launches, "MANY", (32, 64, 128))
    monkeypatch.setattr(launches, "FEW", (1, 64, 128))
    launched: list[tuple[str, int]] = []

    def note(name: str) -> object:
        return lambda x, *rest: launched.append((name, x.shape[0]))

    for module, name in (
        (gluon_products, "wgmma_sp"), (gluon_products, "mma_sp"), (triton_products, "forward"),
        (triton_products, "grad_weight"), (few_tokens, "forward"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, note(f"{module.__name__.rpartition('.')[2]}.{name}"))
    names = []
    for name, call in launches.calls(torch.device("cpu")):
        names.append(name)
        call()
    expected = [("gluon_products.wgmma_sp", 32)] * wgmma + [("gluon_products.mma_sp", 32)]
    expected += [("triton_products.forward", 32), ("triton_products.grad_weight", 32)]
    expected += [("gluon_products.wgmma_sp", 1)] * wgmma + [
        ("gluon_products.mma_sp", 1),
        ("triton_products.forward", 1),
    ]
    expected += [("few_tokens.forward", 1)] * len(few_tokens.configurations(1, 128))
    assert launched == expected
    assert len(set(names)) == len(names) == len(expected) + 3, "and three dense ones"
