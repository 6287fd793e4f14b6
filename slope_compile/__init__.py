"""SLoPe for ``torch.compile``: N:M sparse weights with lazy low-rank adapters, as a graph rewrite.

See the README for the three ways in.  Importing this package compiles, probes and launches nothing.
"""

from __future__ import annotations

from slope_compile.backend import slope
from slope_compile.columns import refresh_columns_
from slope_compile.config import Override, SlopeConfig
from slope_compile.errors import ConfigError, ConversionError, PatternError, ScheduleError, SlopeError
from slope_compile.memory import StateBytes, TrainingState, training_state
from slope_compile.pattern import Pattern
from slope_compile.report import Decision, Reason, Report
from slope_compile.schedule import AdapterSchedule, set_adapters
from slope_compile.sparsify import densify_, sparsify_
from slope_compile.transform import transform

__version__ = "0.1.0"

__all__ = [
    "AdapterSchedule",
    "ConfigError",
    "ConversionError",
    "Decision",
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
    "refresh_columns_",
    "set_adapters",
    "slope",
    "sparsify_",
    "training_state",
    "transform",
]
