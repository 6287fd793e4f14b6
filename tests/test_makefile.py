"""The Makefile: which environment a command uses, and what it says where there can be none.  Nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = f"python{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The suite may itself run under make, which hands its own flags and variables on.
    ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "TORCH", "PYTHON", "VENV", "PYTEST_ARGS", "SLOW")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def environment(*arguments: str) -> str:
    """The folder in which a command would install, by ``make -n``, which only prints."""
    printed = make("--dry-run", "--always-make", "install", *arguments).stdout
    return printed.splitlines()[-1].removeprefix("touch ").removesuffix("/.installed")


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        pytest.param((), ".venv", id="default"),
        pytest.param(("TORCH=2.13.0",), ".venv", id="the default torch by name"),
        pytest.param(("TORCH=2.11",), ".venv-torch2.11", id="torch"),
        pytest.param((f"PYTHON={sys.executable}",), f".venv-{HERE}", id="python by path"),
        pytest.param((f"PYTHON={sys.executable}", "TORCH=2.12"), f".venv-torch2.12-{HERE}", id="both"),
        pytest.param(("VENV=elsewhere",), "elsewhere", id="named"),
    ],
)
def test_each_torch_and_each_python_has_an_environment_of_its_own(arguments: tuple[str, ...], folder: str) -> None:
    assert environment(*arguments) == folder


def test_a_path_is_named_by_the_version_behind_it(tmp_path: Path) -> None:
    """Two interpreters of one file name must not share an environment."""
    for version in ("3.11", "3.12"):
        python = tmp_path / version / "python3"
        python.parent.mkdir()
        python.write_text(f"#!/bin/sh\necho {version}\n")
        python.chmod(0o755)
        assert environment(f"PYTHON={python}") == f".venv-python{version}"


def test_another_torch_is_tested_without_the_lint() -> None:
    """Types are checked against the default torch, whose annotations they follow."""
    assert "mypy" in make("--dry-run", "test").stdout
    assert "mypy" not in make("--dry-run", "test", "TORCH=2.11").stdout


def test_a_python_that_is_too_old_is_named_before_anything_is_installed(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    # Runs what the Makefile gives it, with another version in place of its own.
    python.write_text(
        f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 10, 1)\nexec(sys.argv[sys.argv.index('-c') + 1])\n"
    )
    python.chmod(0o755)
    done = make("install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert f"{python} is Python 3.10, and this project needs 3.11 or later" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_slow_tests_run_when_asked_for() -> None:
    assert "-m 'not slow'" in make("--dry-run", "test").stdout
    assert "not slow" not in make("--dry-run", "test", "SLOW=1").stdout
