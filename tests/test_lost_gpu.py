"""A GPU test that leaves the device unusable is named, and does not take those after it along."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest, torch
pytestmark = pytest.mark.gpu
lost = []

def answer():
    if lost:
        raise RuntimeError("an illegal instruction was encountered")

torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = answer

def test_cusparselt_before():
    assert False, "comes last"

def test_right():
    answer()

def test_that_breaks_it():
    lost.append(1)

def test_after():
    answer()
"""


@pytest.mark.slow
def test_the_one_that_breaks_it_fails(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a device\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rsE", "-p", "no:cacheprovider", "-c", "pytest.ini", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "2 passed, 2 skipped, 1 error" in done.stdout, done.stdout + done.stderr
    assert "test_it.py::test_that_breaks_it leaves the GPU unusable: an illegal instruction" in done.stdout
    assert "the GPU answers no more since test_it.py::test_that_breaks_it" in done.stdout
    assert "comes last" not in done.stdout
