"""The exceptions a user can meet.  Each message names the thing, the value, and the way out."""

from __future__ import annotations


class SlopeError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(SlopeError, ValueError):
    """A configuration field or a backend option has a value that cannot be used; the message names it."""


class ConversionError(SlopeError, RuntimeError):
    """A model or graph cannot be converted (or converted back).  Nothing has been changed when it is raised."""


class PatternError(SlopeError, ValueError):
    """A weight or its metadata does not have the N:M pattern it is said to have."""


class ScheduleError(SlopeError, RuntimeError):
    """An adapter schedule was given a model, a step or a state it cannot work with."""
