"""What to make sparse and how: one frozen value, checked when it is made, and a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from slope_compile.errors import ConfigError
from slope_compile.pattern import Pattern

MaskKind = Literal["random", "magnitude"]
Backward = Literal["double_pruned", "exact"]
ColumnRefresh = int | Literal["backward", "never"]

_LAYER_FIELDS = ("pattern", "mask", "backward", "column_refresh", "adapter_rank", "adapter_scale")

_EVERYTHING = (".*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The settings of one linear layer, after overrides.  See :class:`SlopeConfig` for the fields."""

    pattern: Pattern
    mask: MaskKind
    seed: int
    backward: Backward
    column_refresh: ColumnRefresh
    adapter_rank: int
    adapter_scale: float

    @property
    def double_pruned(self) -> bool:
        """Whether the compiled input gradient uses W^{R,C} instead of W^R."""
        return self.backward == "double_pruned"

    @property
    def stores_columns(self) -> bool:
        """Whether the column mask is state; with ``"backward"`` it is picked anew each time instead."""
        return self.double_pruned and self.column_refresh != "backward"

    def double_prunes(self, N: int) -> bool:
        """Whether a weight with N out_features gets the double-pruned input gradient.

        The groups of a column have to divide N; where they do not, the gradient is the exact one.
        """
        return self.double_pruned and N % self.pattern.group == 0

    def stores_columns_for(self, N: int) -> bool:
        """Whether the column mask of a weight with N out_features is state."""
        return self.stores_columns and self.double_prunes(N)

    @property
    def interval(self) -> int:
        """Optimizer steps between two refreshes of a stored column mask; 0 = never."""
        return self.column_refresh if isinstance(self.column_refresh, int) else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """Other settings for the layers whose module path matches; a field left at ``None`` is not changed."""

    path: str
    """Regular expression that must match the whole module path, e.g. ``r"h\\.(9|10|11)\\..*"``."""
    pattern: str | None = None
    mask: MaskKind | None = None
    backward: Backward | None = None
    column_refresh: ColumnRefresh | None = None
    adapter_rank: int | None = None
    adapter_scale: float | None = None

    def __post_init__(self) -> None:
        _check_regex("overrides.path", self.path)
        _check_layer_fields(self, "overrides.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Override:
        """Inverse of ``{"path": self.path} | self.changes()``.

        Raises:
            ConfigError: an unknown or unusable field, or no path.
        """
        check_names(data, [f.name for f in dataclasses.fields(cls)], "Override field")
        if "path" not in data:
            raise ConfigError(f"overrides.path: missing in {dict(data)!r}; '.*' matches every layer")
        return cls(**data)

    def changes(self) -> dict[str, Any]:
        """The fields that this override sets."""
        return {name: getattr(self, name) for name in _LAYER_FIELDS if getattr(self, name) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlopeConfig:
    """How a model is made sparse (SLoPe, arXiv 2405.16325).

    Raises:
        ConfigError: a field has a value that cannot be used; the message names the field and valid values.
    """

    pattern: str = "2:4"
    """kept:group along in_features.  1:2, 2:4, 1:4, 2:8, 4:8 and their like; 2:4 is the accelerated one."""
    mask: MaskKind = "random"
    """How the static forward mask is chosen: every weight equally likely (the paper's text, section 2.1), or the
    largest of each group by magnitude.  A weight that has the pattern already keeps it, whatever this says."""
    seed: int = 0
    """Seed of random masks.  A mask depends on this, the module path and the shape only: equal on every rank."""
    backward: Backward = "double_pruned"
    """Input gradient of the compiled model: with the twice pruned W^{R,C} (the method) or with W^R ("exact")."""
    column_refresh: ColumnRefresh = 100
    """When the column mask of W^{R,C} is picked again: every so many optimizer steps, at each "backward", or
    "never".  The authors' accuracy runs use every backward, their released fast path 100 steps."""
    adapter_rank: int = 0
    """R of the lazy low-rank adapters B @ A; 0 = none."""
    adapter_scale: float | None = None
    """Factor of the adapter product, the same in training and inference; ``None`` = 1 / adapter_rank."""
    include: tuple[str, ...] = _EVERYTHING
    """Regular expressions; a layer is considered when one of them matches its whole module path."""
    exclude: tuple[str, ...] = ()
    """Regular expressions; a layer is left dense when one of them matches its whole module path."""
    first_dense: bool = True
    """Keep the first linear after the input dense (with its query/key/value siblings), as the method does."""
    heads_dense: bool = True
    """Keep output heads dense, as the method does, and what chooses among the experts of a mixture."""
    overrides: tuple[Override, ...] = ()
    """Per-layer settings; the first one whose path matches is used."""

    def __post_init__(self) -> None:
        _check_layer_fields(self, "")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed: expected an integer, got {self.seed!r}")
        for name in ("first_dense", "heads_dense"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
                hint = f"; write ({value!r},) for one" if isinstance(value, str) else ""
                raise ConfigError(f"{name}: expected a tuple of regular expressions, got {value!r}{hint}")
            for item in value:
                _check_regex(name, item)
            object.__setattr__(self, name, tuple(value))
        overrides: object = self.overrides
        if not isinstance(overrides, tuple | list) or not all(isinstance(o, Override) for o in overrides):
            raise ConfigError(f"overrides: expected a tuple of Override, got {self.overrides!r}")
        object.__setattr__(self, "overrides", tuple(self.overrides))

    def selects(self, path: str) -> bool:
        """Whether ``include`` and ``exclude`` let the layer at this module path be considered."""
        return _any_match(self.include, path) and not _any_match(self.exclude, path)

    def names(self, path: str) -> bool:
        """Whether ``include`` says more than its default, and lets the weight at this path be considered."""
        return self.include != _EVERYTHING and self.selects(path)

    def layer(self, path: str) -> LayerConfig:
        """The settings of the layer at this module path."""
        fields = {name: getattr(self, name) for name in _LAYER_FIELDS}
        override = next((item for item in self.overrides if re.fullmatch(item.path, path)), None)
        if override is not None:
            fields |= override.changes()
        rank = fields["adapter_rank"]
        if fields["adapter_scale"] is None:
            fields["adapter_scale"] = 1.0 / rank if rank else 1.0
        return LayerConfig(**fields | {"pattern": Pattern.parse(fields["pattern"]), "seed": self.seed})

    def unused(self, paths: list[str]) -> list[str]:
        """The ``include``/``exclude``/``overrides`` expressions that match none of these module paths."""
        rules = [("include", item) for item in self.include]
        rules += [("exclude", item) for item in self.exclude]
        rules += [("overrides", item.path) for item in self.overrides]
        return [
            f"{field} {rule!r}" for field, rule in rules if not any(re.fullmatch(rule, path) for path in paths)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: numbers, strings, booleans, lists and dicts."""
        data = dataclasses.asdict(self)
        data["overrides"] = [{"path": item.path} | item.changes() for item in self.overrides]
        return data | {"include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SlopeConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown or unusable field.
        """
        fields = dict(data)
        check_names(fields, [f.name for f in dataclasses.fields(cls)], "SlopeConfig field")
        if isinstance(fields.get("overrides"), tuple | list):  # anything else is refused below
            fields["overrides"] = tuple(
                Override.from_dict(item) if isinstance(item, Mapping) else item for item in fields["overrides"]
            )
        return cls(**fields)

    def to_json(self) -> str:
        """This configuration as one JSON object, keys sorted: equal configurations give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SlopeConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            ConfigError: the text is not a JSON object, or a field is unknown or unusable.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"SlopeConfig: not valid JSON ({error})") from error
        if not isinstance(data, dict):
            raise ConfigError(f"SlopeConfig: expected a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)


def checked_config(who: str, config: object) -> SlopeConfig:
    """The configuration that a function was given; the default for None.

    Raises:
        ConfigError: something else; ``who`` is the function's name.
    """
    if config is None:
        return SlopeConfig()
    if not isinstance(config, SlopeConfig):
        raise ConfigError(
            f"{who}: config: expected a SlopeConfig, got {config!r}; "
            "SlopeConfig(pattern='2:4') or SlopeConfig.from_dict({'pattern': '2:4'}) makes one"
        )
    return config


def check_names(given: Mapping[str, Any], valid: list[str], what: str) -> None:
    """Raise ConfigError for the first name in ``given`` that is not valid, naming the nearest one that is."""
    for name in given:
        if name not in valid:
            raise ConfigError(f"{what} {name!r} is unknown; {nearest(str(name), valid)}")


def nearest(name: str, valid: list[str]) -> str:
    """``did you mean 'x'?`` or, when nothing is near, the list of valid names."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(sorted(valid))}"


def _any_match(rules: tuple[str, ...], path: str) -> bool:
    return any(re.fullmatch(rule, path) for rule in rules)


def _check_regex(field: str, rule: object) -> None:
    if not isinstance(rule, str):
        raise ConfigError(f"{field}: expected a regular expression, got {rule!r}")
    try:
        re.compile(rule)
    except re.error as error:
        raise ConfigError(f"{field}: {rule!r} is not a regular expression ({error})") from error


def _check_layer_fields(config: SlopeConfig | Override, prefix: str) -> None:
    optional = isinstance(config, Override)

    def given(name: str) -> bool:
        return not (optional and getattr(config, name) is None)

    if given("pattern"):
        try:
            Pattern.parse(config.pattern)
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from error
    for name, choices in (("mask", ("random", "magnitude")), ("backward", ("double_pruned", "exact"))):
        if given(name) and getattr(config, name) not in choices:
            raise ConfigError(f"{prefix}{name}: expected one of {choices}, got {getattr(config, name)!r}")
    if given("column_refresh"):
        refresh = config.column_refresh
        whole = isinstance(refresh, int) and not isinstance(refresh, bool) and refresh > 0
        if not whole and refresh not in ("backward", "never"):
            raise ConfigError(
                f"{prefix}column_refresh: expected a number of optimizer steps (1 or more), 'backward' or 'never', "
                f"got {refresh!r}"
            )
    if given("adapter_rank"):
        rank = config.adapter_rank
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ConfigError(f"{prefix}adapter_rank: expected 0 (none) or a positive integer, got {rank!r}")
    scale: object = config.adapter_scale
    positive = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < math.inf
    if scale is not None and not positive:
        raise ConfigError(f"{prefix}adapter_scale: expected a positive number or None, got {scale!r}")
