"""``slope-compile inspect MODULE:FACTORY``: what the backend would do with a model, as text, JSON or a drawing."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slope_compile import cost
from slope_compile.config import SlopeConfig
from slope_compile.errors import ConfigError

DESCRIPTION = """\
Say for each linear of a model what torch.compile(model, backend="slope") would do with it, and why.

FACTORY is called without arguments and returns (model, args) or (model, args, kwargs): the model, and what it is
called with.  The model runs once as it is; nothing is pruned or changed.  MODULE is imported as Python does it, the
current folder included."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``slope-compile``."""
    parser = commands.add_parser(
        "inspect",
        help="say what the backend would do with a model, linear by linear, without doing it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="MODULE:FACTORY", help="for example my_models:small_gpt")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a SlopeConfig as JSON (SlopeConfig.to_json)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw the linears before and after")
    parser.add_argument("--device", metavar="NAME", help=f"predict times for one of {', '.join(cost.DATA_SHEETS)}")
    parser.add_argument("--measure", action="store_true", help="time the forward product of each sparse linear here")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation; returns the exit status."""
    from slope_compile.explanation import explain  # Dynamo: slow to import, and no other command needs it

    config = None if arguments.config is None else _config(arguments.config)
    model, args, kwargs = load(arguments.target)
    found = explain(model, *args, config=config, device=arguments.device, measure=arguments.measure, **kwargs)
    sys.stdout.write((found.to_json() if arguments.json else str(found)) + "\n")
    if arguments.svg is not None:
        arguments.svg.parent.mkdir(parents=True, exist_ok=True)
        found.to_svg(arguments.svg)
        sys.stderr.write(f"drawing: {arguments.svg}\n")
    return 0


def _config(path: Path) -> SlopeConfig:
    try:
        return SlopeConfig.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"inspect: --config: {path} cannot be read: {error.strerror}") from error


def load(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Import and call ``MODULE:FACTORY``.

    Returns:
        The model, positional and keyword arguments.

    Raises:
        ConfigError: there is no such module or function, or it returns something else.
    """
    name, separator, attribute = target.partition(":")
    if not (separator and name and attribute):
        raise ConfigError(f"inspect: expected MODULE:FACTORY, as in my_models:small_gpt, got {target!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; an installed script starts with its own folder
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # found, but something that it imports is missing: the traceback says what
        raise ConfigError(
            f"inspect: no module named {error.name!r}; run the command in the folder that holds it, or install it"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ConfigError(f"inspect: {name} has no function {attribute!r}")
    made = factory()
    if not isinstance(made, tuple | list) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        shown = type(made).__name__
        raise ConfigError(f"inspect: {target} returned {shown}; expected (model, args) or (model, args, kwargs)")
    args, kwargs = made[1], (made[2] if len(made) == 3 else {})
    if not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        shown = f"{type(args).__name__} and {type(kwargs).__name__}"
        raise ConfigError(f"inspect: {target}: args must be a tuple and kwargs a dict, got {shown}")
    return made[0], tuple(args), dict(kwargs)
