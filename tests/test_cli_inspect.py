"""``slope-compile inspect``: what a user gets for a model in a file of theirs, and for what they get wrong."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import slope_compile as slope
from slope_compile import cli

FACTORIES = """
import torch
from toy import token_ids, toy

def plain():
    return toy(torch.float32), (token_ids(3, 5),)

def named():
    return toy(torch.float32), (), {"ids": token_ids(2, 4)}

def prepared():
    import slope_compile as slope
    model = toy(torch.float32)
    slope.sparsify_(model, slope.SlopeConfig(pattern="1:2"))
    return model, (token_ids(),)

def no_tuple():
    return toy()

def a_tensor():
    return toy(torch.float32), token_ids()

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories_of_a_user.py").write_text(FACTORIES)
    (tmp_path / "importing_what_is_missing.py").write_text("import a_package_that_is_missing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "factories_of_a_user", raising=False)
    return tmp_path


def test_text_and_drawing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = folder / "new" / "graph.svg"
    given = ["inspect", "factories_of_a_user:plain", "--svg", str(drawing), "--measure", "--device", "H200-SXM"]
    assert cli.main(given) == 0
    text = capsys.readouterr().out
    for part in ("blocks.0.qkv", "first linear after the input", "7 of 9 linears sparse", "us, measured", "before"):
        assert part in text
    assert ET.parse(drawing).getroot().tag.endswith("svg")


def test_json_and_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "config.json"
    file.write_text(slope.SlopeConfig(pattern="1:4", backward="exact").to_json())
    assert cli.main(["inspect", "factories_of_a_user:named", "--json", "--config", str(file)]) == 0
    data = json.loads(capsys.readouterr().out)
    sparse = [row for row in data["linears"] if row["sparse"]]
    assert {(row["pattern"], row["backward"], row["density"]) for row in sparse} == {("1:4", "exact", 0.25)}
    assert data["linears"][0]["tokens"] == "8"


def test_a_prepared_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "factories_of_a_user:prepared", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["linears"]
    assert {row["pattern"] for row in rows if row["sparse"]} == {"1:2"}
    assert {row["reason"] for row in rows if row["sparse"]} == {"PREPARED"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["no_colon"], "expected MODULE:FACTORY", id="no colon"),
        pytest.param(["not_there:plain"], "no module named 'not_there'", id="no module"),
        pytest.param(["factories_of_a_user:missing"], "has no function 'missing'", id="no function"),
        pytest.param(["factories_of_a_user:number"], "has no function 'number'", id="not callable"),
        pytest.param(["factories_of_a_user:no_tuple"], "returned Toy; expected (model, args)", id="no tuple"),
        pytest.param(
            ["factories_of_a_user:a_tensor"], "must be a tuple and kwargs a dict, got Tensor and dict", id="bare tensor"
        ),
        pytest.param(["factories_of_a_user:plain", "--config", "gone.json"], "gone.json cannot be read", id="config"),
        pytest.param(["factories_of_a_user:plain", "--device", "B200"], "no data sheet for 'B200'", id="device"),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", *arguments]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_what_the_user_s_module_lacks_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        cli.main(["inspect", "importing_what_is_missing:factory"])
