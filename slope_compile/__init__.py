"""SLoPe for ``torch.compile``: N:M sparse weights with lazy low-rank adapters, as a graph rewrite.

See the README for the three ways in.  Importing this package compiles, probes and launches nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slope_compile.columns import refresh_columns_
from slope_compile.config import Override, SlopeConfig
from slope_compile.errors import ConfigError, ConversionError, PatternError, ScheduleError, SlopeError
from slope_compile.memory import StateBytes, TrainingState, training_state
from slope_compile.pattern import Pattern
from slope_compile.report import Decision, Reason, Report
from slope_compile.schedule import AdapterSchedule, set_adapters
from slope_compile.sparsify import densify_, sparsify_

if TYPE_CHECKING:
    from slope_compile.backend import slope
    from slope_compile.explanation import Explanation, explain
    from slope_compile.program import transform

__version__ = "0.1.0"

__all__ = [
    "AdapterSchedule",
    "ConfigError",
    "ConversionError",
    "Decision",
    "Explanation",
    "Override",
    "Pattern",
    "PatternError",
    "Reason",
    "Report",
    "ScheduleError",
    "SlopeConfig",
    "SlopeError",
    "StateBytes",
    "TrainingState",
    "densify_",
    "explain",
    "refresh_columns_",
    "set_adapters",
    "slope",
    "sparsify_",
    "training_state",
    "transform",
]


def __getattr__(name: str) -> Any:
    """``slope``, ``explain`` and ``transform`` on first use: Dynamo and torch.export are slow to import."""
    if name == "slope":
        from slope_compile.backend import slope

        return slope
    if name in ("explain", "Explanation"):
        from slope_compile import explanation

        return getattr(explanation, name)
    if name == "transform":
        from slope_compile.program import transform

        return transform
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
