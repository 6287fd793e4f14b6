"""The tests of the Triton kernels in Triton's interpreter, in a process of its own.

``TRITON_INTERPRET`` is read when a kernel is imported and changes Triton for the whole process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("marked", "least"),
    [("not slow", 80), pytest.param("slow", 5, marks=pytest.mark.slow)],
)
def test_every_kernel_in_the_interpreter(marked: str, least: int) -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marked, "tests/gpu"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed.group(1)) > least, result.stdout[-2000:]  # noqa: PT018
