"""The options of the backend: its own, Inductor's, and the error messages for bad ones."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import slope_compile as slope
from recording import compiled, record
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.options import parse_options
from toy import token_ids, toy


def test_without_options() -> None:
    parsed = parse_options(None, None)
    assert parsed.config == slope.SlopeConfig()
    assert parsed.given == frozenset()
    assert parsed.compiler == "inductor"
    assert parsed.patches == {}


def test_fields_are_those_of_slope_config() -> None:
    overrides = (slope.Override(path="a", pattern="2:8"),)
    given = {"pattern": "1:4", "seed": 7, "exclude": ("head",), "overrides": overrides}
    parsed = parse_options(None, given)
    assert parsed.config == slope.SlopeConfig(pattern="1:4", seed=7, exclude=("head",), overrides=overrides)
    assert parsed.given == frozenset(given)


def test_a_whole_config() -> None:
    config = slope.SlopeConfig(backward="exact", adapter_rank=3)
    parsed = parse_options(None, {"config": config})
    assert parsed.config is config
    assert parsed.given == {"backward", "adapter_rank"}


@pytest.mark.parametrize(
    "name",
    [pytest.param("epilogue_fusion", id="plain"), pytest.param("triton.cudagraphs", id="nested")]
)
def test_other_options_are_passed_on_to_inductor(name: str) -> None:
    assert parse_options(None, {name: True}).patches == {name: True}


def test_inductor_options_with_hyphens() -> None:
    """As ``torch.compile`` itself takes them."""
    assert parse_options(None, {"max-autotune": True}).patches == {"max_autotune": True}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        pytest.param("default", {}, id="default"),
        pytest.param("reduce-overhead", {"triton.cudagraphs": True}, id="reduce-overhead"),
        pytest.param(
            "max-autotune-no-cudagraphs",
            {"max_autotune": True, "coordinate_descent_tuning": True},
            id="max-autotune-no-cudagraphs",
        ),
    ],
)
@pytest.mark.parametrize("where", ["argument", "option"])
def test_modes(mode: str, expected: Mapping[str, Any], where: str) -> None:
    parsed = parse_options(mode, {}) if where == "argument" else parse_options(None, {"mode": mode})
    assert parsed.patches == expected


def test_an_option_overrides_its_mode() -> None:
    patches = parse_options("max-autotune-no-cudagraphs", {"coordinate_descent_tuning": False}).patches
    assert patches == {"max_autotune": True, "coordinate_descent_tuning": False}


def test_the_same_mode_twice_is_no_contradiction() -> None:
    assert parse_options("reduce-overhead", {"mode": "reduce-overhead"}).patches == {"triton.cudagraphs": True}


BAD = [
    pytest.param(None, {"patern": "2:4"}, ("'patern'", "'pattern'"), id="unknown_near_ours"),
    pytest.param(None, {"epilog_fusion": 1}, ("'epilog_fusion'", "'epilogue_fusion'"), id="unknown_near_inductor"),
    pytest.param(None, {"zzzzzzzz": 1}, ("'zzzzzzzz'", "pattern", "compiler", "mode"), id="unknown_near_nothing"),
    pytest.param(None, {"adapter-rank": 4}, ("'adapter-rank'", "'adapter_rank'"), id="ours_with_a_hyphen"),
    pytest.param(None, {"pattern": "2:3"}, ("pattern", "2:3", "'2:4'"), id="bad_pattern"),
    pytest.param(None, {"backward": "double"}, ("backward", "'double'", "double_pruned"), id="bad_backward"),
    pytest.param(None, {"column_refresh": 0}, ("column_refresh", "got 0", "'never'"), id="bad_refresh"),
    pytest.param(None, {"config": {"pattern": "2:4"}}, ("'config'", "SlopeConfig", "dict"), id="config_is_a_dict"),
    pytest.param(
        None,
        {"config": slope.SlopeConfig(), "seed": 1, "pattern": "2:4"},
        ("'config'", "'seed'", "'pattern'", "contradict"),
        id="config_and_fields",
    ),
    pytest.param(None, {"compiler": "aot"}, ("'compiler'", "'aot_eager'", "'aot'"), id="unknown_compiler"),
    pytest.param(
        None,
        {"compiler": "aot_eager", "max_autotune": True},
        ("max_autotune", "contradict", "'aot_eager'"),
        id="inductor_option_without_inductor",
    ),
    pytest.param(
        "reduce-overhead", {"compiler": "eager"}, ("cudagraphs", "contradict", "'eager'"), id="mode_without_inductor"
    ),
    pytest.param("max-autotun", {}, ("'max-autotun'", "'max-autotune'"), id="unknown_mode"),
    pytest.param(None, {"mode": "reduce_overhead"}, ("'reduce_overhead'", "'reduce-overhead'"), id="mode_underscore"),
    pytest.param(
        "max-autotune",
        {"mode": "reduce-overhead"},
        ("'max-autotune'", "'reduce-overhead'", "contradict"),
        id="two_modes",
    ),
]
"""mode, options, what the message has to name: the option, its value, and a valid one."""


@pytest.mark.parametrize(("mode", "options", "named"), BAD)
def test_bad_options(mode: str | None, options: Mapping[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(slope.ConfigError) as caught:
        parse_options(mode, options)
    assert [text for text in named if text not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("mode", "options", "named"),
    [case for case in BAD if case.id in ("unknown_near_ours", "config_and_fields", "unknown_mode", "bad_pattern")],
)
def test_bad_options_through_torch_compile(
    mode: str | None, options: Mapping[str, Any], named: tuple[str, ...]
) -> None:
    """Dynamo wraps what a backend raises; the message is in its own, and no weight has been touched."""
    model = toy()
    before = copy.deepcopy(model.state_dict())
    run = torch.compile(model, backend=slope.slope, mode=mode, options=dict(options) or None)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(token_ids())
    assert isinstance(caught.value.inner_exception, slope.ConfigError)
    assert [text for text in named if text not in str(caught.value)] == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("prepared", "options", "named"),
    [
        pytest.param(
            {"backward": "exact"},
            {"backward": "double_pruned"},
            ("'backward'", "'double_pruned'", "'blocks.0.out'", "'exact'", "sparsify_"),
            id="backward",
        ),
        pytest.param(
            {}, {"pattern": "1:2"}, ("'pattern'", "'1:2'", "'blocks.0.out'", "'2:4'", "sparsify_"), id="pattern"
        ),
        pytest.param(
            {},
            {"config": slope.SlopeConfig(backward="exact")},
            ("'backward'", "'exact'", "'double_pruned'"),
            id="whole_config",
        ),
    ],
)
def test_options_that_contradict_a_prepared_model(
    prepared: Mapping[str, Any], options: Mapping[str, Any], named: tuple[str, ...]
) -> None:
    model = toy()
    slope.sparsify_(model, slope.SlopeConfig(**prepared))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(model, options=options)(token_ids())
    assert isinstance(caught.value.inner_exception, slope.ConfigError)
    assert [text for text in named if text not in str(caught.value)] == []


def test_options_that_repeat_what_a_prepared_model_has_are_fine() -> None:
    model = toy()
    slope.sparsify_(model, slope.SlopeConfig(backward="exact", pattern="1:4"))
    expected = model(token_ids(2, 3))
    assert compiled(model, options={"backward": "exact", "pattern": "1:4"})(token_ids(2, 3)).shape == expected.shape


def test_what_is_exact_for_its_shape_alone_contradicts_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 18), nn.ReLU(), nn.Linear(18, 8))
    report = slope.sparsify_(model, slope.SlopeConfig(first_dense=False))
    assert report.decisions[0].backward == "exact", "18 rows make no groups of four"
    assert compiled(model, options={"backward": "double_pruned"})(torch.randn(2, 8)).shape == (2, 8)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="'1:2'"):
        compiled(model, options={"pattern": "1:2"})(torch.randn(2, 8))


def test_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO how many, at DEBUG each decision with its reason: nothing is skipped in silence."""
    with caplog.at_level(logging.DEBUG, "slope_compile"):
        compiled(toy())(token_ids())
    text = "\n".join(record.getMessage() for record in caplog.records if record.name == "slope_compile")
    assert "7 of 9 linears of the graph are sparse" in text
    assert re.search(r"blocks\.0\.qkv .*first linear after the input", text)
    assert re.search(r"head .*output head", text)


def test_a_graph_without_linears_is_compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(monkeypatch)
    x = torch.randn(5)
    run = torch.compile(lambda x: x.sin() + 1, backend=slope.slope, options={"compiler": "aot_eager"})
    assert torch.equal(run(x), x.sin() + 1)
    (graph,) = recording
    assert graph.before == graph.after
