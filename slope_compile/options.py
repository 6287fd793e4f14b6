"""The options of the backend: ours are the fields of SlopeConfig, everything else is Inductor's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from slope_compile import _inductor, cost
from slope_compile.config import SlopeConfig, nearest
from slope_compile.errors import ConfigError
from slope_compile.passes.fuse import Fuse
from slope_compile.passes.fuse_low_rank import FuseLowRank
from slope_compile.passes.pipeline import FUSIONS

DEFAULT_FUSIONS = frozenset({Fuse.name, FuseLowRank.name})
EXPORT_FUSIONS = frozenset({Fuse.name})
"""In graphs that are transformed adapters stay nodes of their own, which are easier to see and to take out."""
_FIELDS = tuple(field.name for field in dataclasses.fields(SlopeConfig))
_OWN = (*_FIELDS, "config", "compiler", "mode", "fusions", "device")


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """What ``torch.compile(..., backend="slope", mode=..., options=...)`` asks for."""

    config: SlopeConfig
    given: frozenset[str]
    """Names of the SlopeConfig fields that the caller set."""
    compiler: str
    patches: dict[str, Any]
    """Options passed on to Inductor."""
    fusions: frozenset[str] = DEFAULT_FUSIONS
    """Names of the fusions that are on."""
    device: cost.Device | None = None
    """Peaks by which unprofitable rewrites are refused; None where none was given, or the autotuner measures."""


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> BackendOptions:
    """Split and check the options.

    Args:
        mode: as of ``torch.compile``.
        options: any of ``config`` (a SlopeConfig), single fields of SlopeConfig, ``compiler`` ("inductor",
            "aot_eager", "eager": what runs the rewritten graph), ``mode`` (``torch.compile`` takes either ``mode`` or
            ``options``; here both can be had), ``fusions`` (names of those that are to run, of
            ``passes.pipeline.FUSIONS``; default: :data:`DEFAULT_FUSIONS`),
            ``device`` (a :class:`slope_compile.cost.Device` or the name of one in ``cost.DATA_SHEETS``: dense linears
            whose rewrite is predicted slower on it stay dense, unless the autotuner is on, which measures instead),
            and Inductor's own options.

    Raises:
        ConfigError: an unknown option (the nearest valid one is named), contradictory options, or a bad value.
    """
    options = dict(options or {})
    unknown = [name for name in options if name not in _OWN]
    if unknown:
        valid = _inductor.option_names()
        inductor = {name.replace("-", "_") for name in valid}
        for name in unknown:
            if name.replace("-", "_") not in inductor:
                raise ConfigError(f"option {name!r} is unknown to backend 'slope'; {nearest(name, [*_OWN, *valid])}")

    fields = {name: options[name] for name in _FIELDS if name in options}
    config = options.get("config")
    if config is not None and not isinstance(config, SlopeConfig):
        raise ConfigError(f"option 'config': expected a SlopeConfig, got {type(config).__name__}")
    if config is not None and fields:
        raise ConfigError(
            f"options 'config' and {', '.join(map(repr, fields))} contradict each other; "
            "set the field in the SlopeConfig (dataclasses.replace) or leave 'config' out"
        )
    compiler = options.get("compiler", "inductor")
    if compiler not in _inductor.COMPILERS:
        raise ConfigError(f"option 'compiler': expected one of {_inductor.COMPILERS}, got {compiler!r}")
    fusions = parse_fusions("option 'fusions'", options.get("fusions", DEFAULT_FUSIONS))
    if mode is not None and options.get("mode") not in (None, mode):
        raise ConfigError(f"mode={mode!r} and options['mode']={options['mode']!r} contradict each other")
    device = parse_device("option 'device'", options.get("device"))
    mode = mode or options.get("mode")
    patches: dict[str, Any] = {}
    if mode is not None and mode != "default":
        try:
            patches |= _inductor.mode_options(mode)
        except ValueError as error:
            raise ConfigError(f"mode: {mode!r} is unknown; {nearest(str(mode), str(error).split(', '))}") from error
    patches |= {name.replace("-", "_"): options[name] for name in unknown}
    if patches and compiler != "inductor":
        raise ConfigError(
            f"options {', '.join(sorted(patches))} are Inductor's and contradict compiler={compiler!r}; "
            "leave one of them out"
        )
    if config is None:
        config = SlopeConfig(**fields)
        given = frozenset(fields)
    else:
        default = SlopeConfig()
        given = frozenset(n for n in _FIELDS if getattr(config, n) != getattr(default, n))
    autotuned = any(patches.get(name) for name in ("max_autotune", "max_autotune_gemm"))
    return BackendOptions(config, given, compiler, patches, fusions, None if autotuned else device)


def parse_device(what: str, given: cost.Device | str | None) -> cost.Device | None:
    """A device of the cost model, by itself or by name.

    Raises:
        ConfigError: there is no data sheet of that name; ``what`` says where it was given.
    """
    return given if given is None or isinstance(given, cost.Device) else cost.device(given, what)


def parse_fusions(what: str, names: str | Iterable[str]) -> frozenset[str]:
    """Names of fusions, checked.

    Raises:
        ConfigError: there is no fusion of that name; ``what`` says where it was given.
    """
    given = (names,) if isinstance(names, str) else tuple(names)
    for name in given:
        if name not in FUSIONS:
            raise ConfigError(f"{what}: {name!r} is no fusion; {nearest(str(name), list(FUSIONS))}")
    return frozenset(given)
