"""What every test gets: its own seed and a fixed number of threads; and how GPU tests skip."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
"""Tensors here are tiny: more threads cost more than they bring, and workers would fight for cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch from the test's name: each test has its own numbers, the same in any order and selection."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value
