"""What the tests of the benchmarks share: tiny cases, and set-ups that save time."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import cases, gpu_kernels, gpu_layer, gpu_model, limits, rotation
from benchmarks.cases import Measurement, Options, Run
from benchmarks.timing import CpuStopwatch, Plan

CPU = torch.device("cpu")
QUICK = Plan(seconds=0.0, min_rounds=2)


def run_cases(suite: str, pattern: str) -> list[Measurement]:
    """What the tiny cases whose id matches yield."""
    chosen = [c for c in cases.cases(suite, Options(tiny=True, threads=(1,))) if re.fullmatch(pattern, c.id)]
    assert chosen
    return [measurement for c in chosen for measurement in c.measure(Run(QUICK, CpuStopwatch()))]


def shrink_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache so small that few copies of a weight exceed it."""
    monkeypatch.setattr(rotation, "cache_bytes", lambda _: 1 << 14)


def leave_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes most of a tiny case's time, and other tests compile these models."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def give_limits(monkeypatch: pytest.MonkeyPatch) -> limits.Limits:
    """Limits of the device that nobody had to measure."""
    known = limits.Limits(bandwidth=1e10, flops=1e11)
    for module in (gpu_kernels, gpu_layer, gpu_model):
        monkeypatch.setattr(module, "limits", lambda *_: known)
    return known
