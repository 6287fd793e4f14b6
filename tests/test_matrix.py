"""The coverage table: a sample of its cells, each model and each mode among them, and its data.

``python -m tests.matrix run`` fills the whole table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from matrix import table
from matrix.cells import MODES, fill
from matrix.models import BY_NAME, MODELS

pytest.importorskip("transformers")

SAMPLE = {
    "breaks": "sequential convolution gpt2 encoder",
    "generate": "opt",
    "autocast": "mlp llama",
    "train": "mistral roberta",
    "accumulation": "convolution qwen2",
    "inference": "encoder qwen3 switch t5",
    "checkpointing": "attention gemma",
    "drop-in": "gemma3 phi3 attention",
    "export": "phi bert whisper mixtral encoder",
    "dynamic": "mlp vit",
}
"""Mode -> models; all but the first are slow."""

CELLS = [
    pytest.param(mode, model, marks=[pytest.mark.slow] if others else [])
    for mode, models in SAMPLE.items()
    for others, model in enumerate(models.split())
]
README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.parametrize(("mode", "model"), CELLS)
def test_cell(mode: str, model: str) -> None:
    assert fill(BY_NAME[model], mode).eligible


@pytest.mark.parametrize("name", BY_NAME)
def test_every_model_prepared_and_eager(name: str) -> None:
    assert fill(BY_NAME[name], "eager").eligible


@pytest.mark.slow
def test_through_inductor() -> None:
    assert fill(BY_NAME["attention"], "inference", "inductor").eligible


def test_the_sample_has_each_model_and_each_mode() -> None:
    assert {model for models in SAMPLE.values() for model in models.split()} == set(BY_NAME)
    assert SAMPLE.keys() | {"eager"} == set(MODES)


def test_the_committed_data_has_every_cell_and_each_one_holds() -> None:
    applicable = {f"{m.name}/{mode}" for m in MODELS for mode in MODES if mode not in m.skipped}
    results = table.read()
    assert set(results) == applicable
    assert {name for name, cell in results.items() if cell["status"] != "ok"} == set()
    assert {name for name, cell in results.items() if cell["sparse"] < cell["eligible"]} == set()


def test_the_readme_has_the_table_that_the_data_makes() -> None:
    text = README.read_text(encoding="utf-8")
    assert table.updated(text, table.read()) == text, "run python -m tests.matrix report --readme README.md"
