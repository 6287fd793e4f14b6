"""``SlopeConfig``: every value is checked where it is made, errors name the field, JSON gives the same value back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from slope_compile.config import Override, SlopeConfig
from slope_compile.errors import ConfigError
from slope_compile.pattern import Pattern

EVERYTHING = SlopeConfig(
    pattern="2:8",
    mask="magnitude",
    seed=-7,
    backward="exact",
    column_refresh="never",
    adapter_rank=8,
    adapter_scale=0.25,
    include=(r"h\.\d+\..*", "extra"),
    exclude=(r".*\.attn\..*",),
    first_dense=False,
    heads_dense=False,
    overrides=(
        Override(path=r"h\.0\..*", pattern="1:4", adapter_rank=0),
        Override(path="extra", mask="random", backward="double_pruned", column_refresh=10, adapter_scale=2.0),
    ),
)
"""No field has its default."""


def test_the_example_leaves_no_field_out() -> None:
    default = SlopeConfig()
    for field in dataclasses.fields(SlopeConfig):
        assert getattr(EVERYTHING, field.name) != getattr(default, field.name), field.name


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [pytest.param(SlopeConfig(), id="default"), pytest.param(EVERYTHING, id="everything")]
)
def test_json_round_trip(config: SlopeConfig) -> None:
    text = config.to_json()
    again = SlopeConfig.from_json(text)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == text
    assert SlopeConfig.from_dict(config.to_dict()) == config
    # Strictly JSON: NaN or Infinity would be text that other readers refuse.
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in {text}"))


def test_equal_configurations_give_equal_text() -> None:
    assert SlopeConfig(seed=1, pattern="2:4").to_json() == SlopeConfig(pattern="2:4", seed=1).to_json()
    assert SlopeConfig(include=["a"]).to_json() == SlopeConfig(include=("a",)).to_json()  # type: ignore[arg-type]


def test_every_field_changes_the_text() -> None:
    default = SlopeConfig()
    texts = {
        dataclasses.replace(default, **{f.name: getattr(EVERYTHING, f.name)}).to_json()
        for f in dataclasses.fields(SlopeConfig)
    }
    assert len(texts | {default.to_json()}) == len(dataclasses.fields(SlopeConfig)) + 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("{", "not valid JSON", id="no_json"),
        pytest.param("[]", "expected a JSON object, got list", id="no_object"),
        pytest.param('{"patern": "2:4"}', "field 'patern' is unknown; did you mean 'pattern'", id="near_a_field"),
        pytest.param('{"zzz": 1}', "field 'zzz' is unknown; valid are .*adapter_rank", id="near_nothing"),
        pytest.param('{"overrides": [{"path": "a", "ranks": 1}]}', "Override field 'ranks'", id="unknown_in_override"),
        pytest.param('{"overrides": [{"pattern": "2:8"}]}', "overrides.path: missing", id="override_without_path"),
        pytest.param('{"overrides": 3}', "overrides: expected a tuple of Override, got 3", id="overrides_a_number"),
        pytest.param('{"overrides": ["a"]}', "overrides: expected a tuple of Override", id="override_a_text"),
        pytest.param('{"overrides": {"path": "a"}}', "overrides: expected a tuple", id="overrides_an_object"),
        pytest.param('{"seed": "1"}', "seed: expected an integer, got '1'", id="value_of_another_type"),
    ],
)
def test_json_that_is_no_configuration(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SlopeConfig.from_json(text)


# --- validation ------------------------------------------------------------------------------------------------------

WRONG_LAYER_VALUES = [
    ("pattern", "3:5"),
    ("pattern", 24),
    ("mask", "topk"),
    ("mask", ["random"]),
    ("backward", "double"),
    ("column_refresh", 0),
    ("column_refresh", -5),
    ("column_refresh", True),
    ("column_refresh", 1.5),
    ("column_refresh", "100"),
    ("column_refresh", "always"),
    ("adapter_rank", -1),
    ("adapter_rank", 1.0),
    ("adapter_rank", True),
    ("adapter_scale", 0.0),
    ("adapter_scale", -1.0),
    ("adapter_scale", float("nan")),
    ("adapter_scale", float("inf")),
    ("adapter_scale", True),
    ("adapter_scale", "1"),
]

WRONG_VALUES = [
    *WRONG_LAYER_VALUES,
    ("pattern", None),
    ("mask", None),
    ("backward", None),
    ("column_refresh", None),
    ("adapter_rank", None),
    ("seed", 1.0),
    ("seed", True),
    ("seed", None),
    ("include", ".*"),
    ("include", 3),
    ("include", (3,)),
    ("include", ("(",)),
    ("exclude", "a"),
    ("exclude", None),
    ("exclude", ("[",)),
    ("first_dense", 1),
    ("heads_dense", "no"),
    ("overrides", Override(path="a")),
    ("overrides", ("a",)),
    ("overrides", None),
]


@pytest.mark.parametrize(("field", "value"), [pytest.param(f, v, id=f"{f}={v!r}") for f, v in WRONG_VALUES])
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: ") as caught:
        SlopeConfig(**{field: value})
    if not (isinstance(value, tuple) and field != "overrides"):
        assert (repr(value) if field != "pattern" else str(value)) in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [pytest.param(f, v, id=f"{f}={v!r}") for f, v in WRONG_LAYER_VALUES])
def test_an_override_is_checked_too(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^overrides\.{field}: "):
        Override(path=".*", **{field: value})


@pytest.mark.parametrize("path", [pytest.param("*", id="no_expression"), pytest.param(3, id="no_text")])
def test_the_path_of_an_override_is_an_expression(path: Any) -> None:
    with pytest.raises(ConfigError, match=r"^overrides\.path: "):
        Override(path=path)


def test_every_field_has_a_wrong_value_here() -> None:
    assert {field for field, _ in WRONG_VALUES} == {f.name for f in dataclasses.fields(SlopeConfig)}
    assert {field for field, _ in WRONG_LAYER_VALUES} == {f.name for f in dataclasses.fields(Override)} - {"path"}


def test_the_message_about_a_broken_expression_shows_it() -> None:
    with pytest.raises(ConfigError, match=r"exclude: 'h\.\(' is not a regular expression \(missing \)"):
        SlopeConfig(exclude=("ok", "h.("))


def test_configurations_cannot_be_changed() -> None:
    for value, field in ((EVERYTHING, "seed"), (EVERYTHING.overrides[0], "path"), (EVERYTHING.layer("a"), "seed")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 1)


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        SlopeConfig("2:4")  # type: ignore[call-arg]


def test_configurations_are_values() -> None:
    assert len({SlopeConfig(), SlopeConfig(), SlopeConfig(seed=1), EVERYTHING}) == 3
    # A list given for a tuple must not make it unhashable, nor change it from outside.
    names = ["a"]
    config = SlopeConfig(include=names)  # type: ignore[arg-type]
    names.append("b")
    assert config.include == ("a",)
    assert isinstance(hash(config), int)


# --- which layer gets what -------------------------------------------------------------------------------------------


def test_other_patterns_in_the_last_blocks() -> None:
    config = SlopeConfig(overrides=(Override(path=r"h\.(2|3)\..*", pattern="2:8"),))
    got = [str(config.layer(f"h.{i}.mlp.up").pattern) for i in range(4)]
    assert got == ["2:4", "2:4", "2:8", "2:8"]


def test_mlp_only() -> None:
    config = SlopeConfig(include=(r".*\.mlp\..*",))
    assert config.selects("h.0.mlp.up")
    assert not config.selects("h.0.attn.q")


def test_expressions_match_the_whole_path() -> None:
    config = SlopeConfig(include=("up",), overrides=(Override(path="h.1", pattern="2:8"),))
    assert not config.selects("h.0.up")
    assert config.selects("up")
    assert str(config.layer("h.1.up").pattern) == "2:4"
    assert str(config.layer("h.10").pattern) == "2:4"


def test_exclude_goes_before_include() -> None:
    config = SlopeConfig(include=(".*",), exclude=("h.0.up",))
    assert not config.selects("h.0.up")
    assert config.selects("h.1.up")


def test_the_first_override_that_matches_is_the_only_one() -> None:
    config = SlopeConfig(
        adapter_rank=4,
        overrides=(Override(path="h.0.*", pattern="2:8"), Override(path=".*", pattern="1:4", adapter_rank=16)),
    )
    first, second = config.layer("h.0.up"), config.layer("h.1.up")
    assert (str(first.pattern), first.adapter_rank) == ("2:8", 4)
    assert (str(second.pattern), second.adapter_rank) == ("1:4", 16)


def test_an_override_changes_what_it_names_and_nothing_else() -> None:
    layer = EVERYTHING.layer("h.0.up")
    assert layer.pattern == Pattern(1, 4)
    assert layer.adapter_rank == 0  # zero is a value, not "not given"
    assert (layer.mask, layer.seed, layer.backward) == ("magnitude", -7, "exact")
    assert (layer.column_refresh, layer.adapter_scale) == ("never", 0.25)


@pytest.mark.parametrize(
    ("rank", "scale", "expected"),
    [
        pytest.param(8, None, 1 / 8, id="one_over_rank"),
        pytest.param(8, 3.0, 3.0, id="given"),
        pytest.param(0, None, 1.0, id="no_adapter"),
    ],
)
def test_scale_of_the_adapter(rank: int, scale: float | None, expected: float) -> None:
    assert SlopeConfig(adapter_rank=rank, adapter_scale=scale).layer("a").adapter_scale == expected


def test_scale_follows_the_rank_of_an_override() -> None:
    config = SlopeConfig(adapter_rank=8, overrides=(Override(path="a", adapter_rank=2),))
    assert config.layer("a").adapter_scale == 1 / 2
    assert config.layer("b").adapter_scale == 1 / 8


@pytest.mark.parametrize(
    ("backward", "refresh", "stores", "interval"),
    [
        pytest.param("double_pruned", 100, True, 100, id="every_100_steps"),
        pytest.param("double_pruned", 1, True, 1, id="every_step"),
        pytest.param("double_pruned", "never", True, 0, id="never"),
        pytest.param("double_pruned", "backward", False, 0, id="each_backward"),
        pytest.param("exact", 100, False, 100, id="exact"),
    ],
)
def test_what_is_stored_for_the_columns(backward: Any, refresh: Any, stores: bool, interval: int) -> None:
    layer = SlopeConfig(backward=backward, column_refresh=refresh).layer("a")
    assert layer.stores_columns is stores
    assert layer.interval == interval


@pytest.mark.parametrize(
    ("backward", "N", "double", "stores"),
    [("double_pruned", 8, True, True), ("double_pruned", 6, False, False), ("exact", 8, False, False)],
)
def test_which_weights_are_double_pruned(backward: Any, N: int, double: bool, stores: bool) -> None:
    layer = SlopeConfig(backward=backward).layer("a")
    assert layer.double_prunes(N) is double
    assert layer.stores_columns_for(N) is stores
    assert not SlopeConfig(backward=backward, column_refresh="backward").layer("a").stores_columns_for(N)


def test_expressions_that_match_nothing_are_found() -> None:
    config = SlopeConfig(
        include=(".*", "typo"), exclude=("h.0.up", "h.9.*"), overrides=(Override(path="h.1.*"), Override(path="nope"))
    )
    assert config.unused(["h.0.up", "h.1.up"]) == ["include 'typo'", "exclude 'h.9.*'", "overrides 'nope'"]
