"""What every test gets: its own seed and a fixed number of threads; and how GPU tests skip."""

from __future__ import annotations

import zlib

import pytest
import torch

THREADS = 1
"""Tensors here are tiny.  A second thread has nothing to gain and waits for the first at every product: where the
cores are shared that costs some ten milliseconds each time."""


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
