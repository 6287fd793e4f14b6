"""The benchmarks' reports: tables, plots and the README's section, from a few results made up for the purpose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

import machine
import pretrain_results
from benchmarks import __main__ as command
from benchmarks import highlights, plots, readme, records, runner, select, tables, tile_table
from benchmarks.cases import Case, Measurement, Run, compare
from benchmarks.timing import Samples, Summary
from training import Curves, Kind, Settings

ROOT = Path(__file__).parents[1]


def fixture_records(tmp_path: Path) -> list[records.Record]:
    """Two sizes of one layer, a model's training and decoding, and a failure."""

    def layer(M: int, ours: float) -> Iterator[Measurement]:
        for name, contenders in (
            ("forward", ("slope",)),
            ("grad_input", ("slope_exact", "slope_double_pruned")),
            ("grad_weight", ("slope",)),
            ("step", ("slope_exact", "slope_double_pruned")),
        ):
            rounds = {"dense": [0.3, 0.3, 0.3]} | {c: [0.3 / ours] * 3 for c in contenders}
            facts = {"shape": {"M": M, "N": 768, "K": 3072}, "dtype": "float32"}
            yield compare(name, Samples(rounds), {c: [c] for c in rounds}, ["dense"], facts)

    def model(_: Run) -> Iterator[Measurement]:
        state = {"weights": 100, "metadata": 0, "gradients": 100, "moments": 200}
        half = {"weights": 50, "metadata": 8, "gradients": 50, "moments": 100}
        none = dict.fromkeys(state, 0)
        facts = {
            "model": "gpt2", "batch": 4, "tokens": 1024, "dtype": "float32",
            "state": {
                "dense": {"linears": state, "adapters": none, "rest": state},
                "slope_exact": {"linears": half, "adapters": none, "rest": state},
            },
        }  # fmt: skip
        rounds = {"dense": [2.0] * 3, "slope_exact": [1.6] * 3}
        yield compare("train", Samples(rounds), {c: [c] for c in rounds}, ["dense"], facts)
        rounds = {"dense": [0.02] * 3, "frozen": [0.016] * 3, "slope": [0.01] * 3}
        facts = {"model": "gpt2", "batch": 1, "tokens": 1, "dtype": "float32"}
        yield compare("decode", Samples(rounds), {c: [c] for c in rounds}, ["dense", "frozen"], facts)

    def compilation(_: Run) -> Iterator[Measurement]:
        facts = {"model": "llama-l2", "layers": 2, "nodes": 200, "linears": 11}
        seconds = {"passes": Summary.of([0.1] * 3), "compilation": Summary.of([20.0])}
        yield Measurement("compile", seconds, {}, facts)

    def of(M: int, ours: float) -> Callable[[Run], Iterable[Measurement]]:
        return lambda _: layer(M, ours)

    def unlucky(_: Run) -> Iterator[Measurement]:
        yield from ()
        raise ValueError("bad luck")

    environment = {
        "device": "Some CPU", "capability": "AVX2", "features": ["avx2"], "cores": 2, "torch": "2.13.0",
        "triton": None, "python": "3.11.7", "commit": "0123456789ab", "dirty": False,
    }  # fmt: skip
    todo: Sequence[Case] = [
        Case("layer/m4", of(4, 0.5), 1), Case("layer/m256", of(256, 2.0), 1), Case("model", model, 2),
        Case("compile", compilation, 1),
        Case("unlucky", unlucky, 1),
    ]  # fmt: skip
    runner.execute(runner.Job("cpu", tmp_path, "python -m benchmarks run --suite cpu", lambda: environment), todo)
    return records.read(tmp_path)


def cells(text: str) -> list[list[str]]:
    """Cells of the lines of all tables in Markdown."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_report_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fixture_records(tmp_path)
    assert command.main(["report", str(tmp_path), "--plots", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out
    for text in ("Some CPU, 2 cores, avx2", "commit 0123456789ab", "768 x 3072", "2.00 (2.00-2.00)", "unlucky",
                 "ValueError: bad luck", "0.520", "Time of the passes"):  # fmt: skip
        assert text in printed
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == ["memory.png", "speedup-cpu-float32-t1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    assert [path.name for path in plots.draw(select.failed(found), tmp_path / "none")] == []


def test_tables(tmp_path: Path) -> None:
    found = fixture_records(tmp_path)
    layers = cells(tables.summary(select.ok(found, *select.PRODUCTS), "github"))
    assert layers[2:] == [["4", *["0.50 (0.50)"] * 6], ["256", *["2.00 (2.00)"] * 6]]
    train, decode = cells(tables.models(select.ok(found, "train", "decode"), "github"))[2:]
    assert train == ["gpt2", "train, exact", "float32", "2", "512.0", "640.0", "1.25 (1.25-1.25)", "-"]
    assert decode[4:] == ["50.0", "100.0", "2.00 (2.00-2.00)", "1.60 (1.60-1.60)"]
    (passes,) = cells(tables.compilation(select.ok(found, "compile"), "github"))[2:]
    assert passes == ["llama-l2", "200", "11", "0.10", "0.50", "20.0", "0.5%"]
    (record,) = select.ok(found, "compile")
    assert tables.compilation_goals([record]) == "share in llama-l2 0.5% (goal: under 2%, met)"
    deeper = {
        "facts": {**record["facts"], "model": "llama-l8", "nodes": 800},
        "seconds": {"passes": {"median": 0.6}, "compilation": {"median": 20.0}},
    }
    goals = tables.compilation_goals([deeper, record])
    assert "llama-l8 3.0% (goal: under 2%, missed)" in goals
    assert goals.endswith("a node of 800 takes 1.50 times as long as one of 200")
    assert select.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_readme_is_written_from_committed_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marks = [mark for name in ("highlights", "measured") for mark in readme.markers(name)]
    text = "before\n{}\nold\n{}\nbetween\n{}\nold\n{}\nafter\n".format(*marks)
    assert readme.updated(text, tmp_path) == text.replace("old", "No results have been committed yet.")
    fixture_records(tmp_path)
    new = readme.updated(text, tmp_path)
    assert readme.updated(new, tmp_path) == new
    assert "Some CPU" in new
    assert "`python -m benchmarks run --suite cpu`" in new
    assert "Failed: unlucky." in new
    assert new.index("one layer, forward and backward") < new.index("between") < new.index("Single layers")
    for mark in marks:
        with pytest.raises(ValueError, match="expected one <!-- "):
            readme.updated(text.replace(mark, ""), tmp_path)
    with pytest.raises(ValueError, match="expected one of the sections highlights, measured"):
        readme.updated("nothing to write", tmp_path)

    path = tmp_path / "README.md"
    path.write_text(text)
    assert command.main(["report", "--write", str(path), "--check"]) == 1
    assert path.read_text() == text
    assert "is not current" in capsys.readouterr().out
    assert command.main(["report", "--write", str(path)]) == 0
    assert command.main(["report", "--write", str(path), "--check"]) == 0


def test_highlights_have_a_row_for_each_thing_measured_and_a_column_for_each_machine(tmp_path: Path) -> None:
    fixture_records(tmp_path)
    sizes = {"M": 128, "N": 64, "K": 32}
    forward = {"product": "forward", "seconds": {"dense": 4.0, "wgmma_sp_64x64": 2.0, "wgmma_sp_64x128": 3.0}}
    exact = {"product": "grad_input", "seconds": {"dense": 4.0, "expanded": 4.0}}
    made = {"wgmma_sp_64x64": 1.0, "recompressed wgmma_sp_64x64": 3.0}  # the columns have to be made
    columns = {"product": "grad_input_columns", "seconds": {"dense": 4.0, **made, "triton 16x16": 2.0}}
    weight = {"product": "grad_weight", "seconds": {"dense": 4.0, "triton 16x16": 8.0, "dense_and_compressed": 5.0}}
    few = {"product": "forward", "M": 1, "seconds": {"dense": 1.0, "triton 16x16": 2.0}}
    products = [entry | sizes for entry in (forward, exact, columns, weight)] + [sizes | few]
    data = {"machine": {"device": "Some GPU", "driver": "1"}, "products": products}
    (tmp_path / "tiles-gpu.json").write_text(json.dumps(data))
    assert cells(highlights.table(tmp_path, "github"))[0] == ["", "Some CPU, AVX2", "Some GPU"]
    assert cells(highlights.table(tmp_path, "github"))[2:] == [
        ["training step (gpt2)", "1.25", "-"],
        ["decoding (gpt2)", "2.00", "-"],
        ["one layer, forward and backward, 64 tokens or more", "**2.00** (2.00 to 2.00)", "**1.21** (1.09 to 1.33)"],
        ["one layer, forward, fewer than 64 tokens", "0.50", "0.50"],
        ["training state (gpt2)", "0.76", "-"],
    ]


def test_highlights_compare_losses_seed_by_seed() -> None:
    losses = {("dense", 0): 2.0, ("dense", 1): 3.0, ("double_pruned", 0): 2.1, ("double_pruned", 1): 2.7}
    found: list[records.Record] = [
        {"status": "ok", "name": "quality", "facts": {"variant": variant, "seed": seed, "validation_loss": loss}}
        for (variant, seed), loss in losses.items()
    ]
    (row,) = (row for row in highlights.ROWS if row.what.startswith("validation loss"))
    assert row.cell(highlights.Machine(found)) == "**-0.100** (-0.300 to +0.100)"
    assert row.cell(highlights.Machine()) == "-"


def test_demo_table(tmp_path: Path) -> None:
    settings = Settings(steps=10, tied=True)
    parts = {"weights": 2, "metadata": 0, "gradients": 2, "moments": 4}
    common = {"validation_loss": 1.5, "tokens_per_second_adapters": None, "compile_seconds": 1.0,
              "recompile_seconds": None, "linear_bytes": parts, "adapter_bytes": 0, "model_bytes": 9}  # fmt: skip
    done: dict[Kind, pretrain_results.Result] = {
        "dense": pretrain_results.Result(kind="dense", tokens_per_second=100.0, **common),  # type: ignore[arg-type]
        "slope": pretrain_results.Result(kind="slope", tokens_per_second=150.0, **common),  # type: ignore[arg-type]
    }
    curves = {kind: Curves() for kind in done}
    path = tmp_path / "demo-some-cpu.json"
    pretrain_results.write_json(path, settings, done, curves, torch.device("cpu"), threads=1, compiled=False)
    data = json.loads(path.read_text())
    assert data["command"] == "python examples/pretrain.py --tied --steps 10 --threads 1 --no-compile"
    assert data["machine"]["device"] == machine.cpu_name()
    assert pretrain_results.read_runs(data) == done
    section = readme.section(tmp_path)
    assert "`python examples/pretrain.py --tied --steps 10 --threads 1 --no-compile`" in section
    assert ["tokens/s, adapters off (median step)", "100", "150", "1.500"] in cells(section)


@pytest.mark.parametrize("path", readme.FILES, ids=lambda path: path.name)
def test_what_is_written_from_results_is_current(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert readme.updated(text, ROOT / "benchmarks" / "results") == text, "run python -m benchmarks report --write"


def test_committed_results_name_no_folders_and_hold_no_half_lines() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json*"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)/", text), path.name
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(line)


def test_the_table_of_tiles_names_the_best_of_each_way() -> None:
    seconds = {"dense": 4e-6, "triton 16x64x128 w4 s4": 8e-6, "triton 16x32x128 w4 s4": 5e-6, "wgmma_sp_64x64_w4": 2e-6,
               "mma_sp_8x64_w1x4 split 4": 4e-6, "expand": 1e-6}  # fmt: skip
    sizes = {"M": 1, "N": 64, "K": 128}
    kept = {"dense": 4e-6, "dense_and_compressed": 5e-6, "compress": 1e-6}
    weight, forward = {"product": "grad_weight", **sizes, "seconds": kept}, {"product": "forward", **sizes}
    text = tile_table.table([weight, forward | {"seconds": seconds}], "tsv")
    _, first, second = ([cell.strip() for cell in line.split("\t")] for line in text.splitlines())
    assert first == ["forward", "1", "64", "128", "4", "-", "0.80", "1.00", "2.00", "-"]
    assert second == ["weight gradient", "1", "64", "128", "4", "0.80", "-", "-", "-", "-"]


def test_the_fastest_way_has_its_columns_made() -> None:
    seconds = {"dense": 4e-6, "triton 16x64x128 w4 s4": 8e-6, "wgmma_sp_64x64_w4": 2e-6}
    assert tile_table.fastest(seconds) == 2e-6
    assert tile_table.fastest(seconds | {"recompressed wgmma_sp_64x64_w4": 3e-6}) == 3e-6


def test_committed_tables_of_tiles_have_every_product() -> None:
    for path in sorted((records.ROOT / "benchmarks" / "results").glob("tiles-*.json")):
        text = tile_table.section(path, "github")
        assert all(title in text for title in tile_table.TITLES.values())
        assert "commit" in text
