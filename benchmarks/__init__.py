"""Measurements of speed and memory against dense PyTorch, and the tables and plots made from them.

    python -m benchmarks run --suite cpu --out runs/cpu
    python -m benchmarks report runs/cpu --plots runs/cpu

Run from the root of the repository; nothing here is installed.  Results meant for the README are committed as files
under ``benchmarks/results/``.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Imported by their own names: the examples' modules for the demo's model and the facts about the machine, and the
# tests' for what counts as a right result.
for _folder in ("tests", "examples"):
    _path = str(Path(__file__).resolve().parents[1] / _folder)
    if _path not in sys.path:
        sys.path.insert(0, _path)
