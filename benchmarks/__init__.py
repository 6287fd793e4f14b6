"""Measurements of speed and memory against dense PyTorch, and the tables and plots made from them.

    python -m benchmarks run --suite cpu --out runs/cpu
    python -m benchmarks report runs/cpu --plots runs/cpu

Run from the root of the repository; nothing here is installed.  Results meant for the README are committed as files
under ``benchmarks/results/``.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The demo's model and the facts about the machine are the examples' modules, imported by their own names.
_EXAMPLES = str(Path(__file__).resolve().parents[1] / "examples")
if _EXAMPLES not in sys.path:
    sys.path.insert(0, _EXAMPLES)
