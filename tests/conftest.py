"""What every test gets: its own seed and a fixed number of threads; how GPU tests skip, and which of them come last."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator

import pytest
import torch

from slope_compile._dynamo import avoid_dangling_guards

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else generate() asks the hub for a model's own code, and waits for it

THREADS = 1
"""Tensors here are tiny.  A second thread has nothing to gain and waits for the first at every product: where the
cores are shared that costs some ten milliseconds each time."""


RISKY = "cusparselt"
"""GPU tests with this in their names call a foreign library, some of whose algorithms end in an illegal instruction.
After that the process cannot use the GPU any more, so these tests run last."""

_broke_the_gpu: list[str] = []
"""The test after which it did not answer."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """The garbage collector leaves alone what was imported for the tests.

    That is hundreds of thousands of objects.  Going through all of them again and again, which tracing a model makes
    the collector do, would take a third of the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped, with the reason, where there is no CUDA device."""
    marked = {item for item in items if item.get_closest_marker("gpu")}
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))
    items.sort(key=lambda item: item in marked and RISKY in item.name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Nothing runs in a process whose GPU is lost: not even a seed can be set."""
    if _broke_the_gpu:
        pytest.skip(f"the GPU answers no more since {_broke_the_gpu[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """The test that loses the GPU is the one that fails, passed or not, and not those after it."""
    try:
        yield
    finally:
        if item.get_closest_marker("gpu") and torch.cuda.is_initialized() and not _broke_the_gpu:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                _broke_the_gpu.append(item.nodeid)
                pytest.fail(f"{item.nodeid} leaves the GPU unusable: {str(error).splitlines()[0]}", pytrace=False)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # as modules are taken down at the end, what they hold is to go too


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)
    avoid_dangling_guards()  # tests drop the guards of many models, of other backends' graphs too


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch from the test's name: each test has its own numbers, the same in any order and selection."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value
