"""Reports of the suites for a GPU, from results made up for the purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import bars, kernel_tables, model_tables, readme, records, runner, select, tables
from benchmarks.cases import Case, Measurement, Run, compare
from benchmarks.timing import Samples, Summary

GPU = {
    "device": "Some GPU", "capability": "9.0", "driver": "580", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0",
    "python": "3.12.3", "commit": "0123456789ab", "dirty": False,
}  # fmt: skip
EMPTY = {"weights": 0, "metadata": 0, "gradients": 0, "moments": 0}


def measurement(name: str, seconds: dict[str, float], baselines: tuple[str, ...], **facts: Any) -> Measurement:
    samples = Samples({contender: [value] * 3 for contender, value in seconds.items()})
    return compare(name, samples, {contender: [contender] for contender in seconds}, baselines, facts)


def kernels(M: int) -> Iterator[Measurement]:
    floor = {kind: {"seconds": 0.1, "bound": "memory"} for kind in ("dense", "sparse")}
    facts = {
        "shape": {"M": M, "N": 4096, "K": 4096}, "dtype": "bfloat16", "floor": floor,
        "limits": {"bandwidth": 4e12, "flops": 8e14},
    }  # fmt: skip
    left_out = {"forward: cutlass": "RuntimeError: compute capability 8.x"}
    # At one token the operator's own pick is slower than dense; a tile that it could have picked is faster.
    own = 1.25 if M == 1 else 0.8
    yield measurement(
        "forward",
        {"dense": 1.0, "compiled": 0.9, "slope": own, "triton_16x64x128": 0.5, "autotuned": 0.6, "cusparselt": 2.0},
        ("dense", "compiled"), left_out=left_out, **facts,
    )  # fmt: skip
    yield measurement(
        "grad_input",
        {"dense": 1.0, "slope_exact": 1.0, "slope_double_pruned": 0.5, "expanded_exact": 2.0,
         "cusparselt_double_pruned": 0.25},
        ("dense",), left_out={}, **facts,
    )  # fmt: skip
    yield measurement("grad_weight", {"dense": 1.0, "slope": 1.0}, ("dense",), left_out={}, **facts)
    yield measurement("low_rank", {"dense": 1.0, "slope": 0.5, "slope_adapter": 0.8}, ("dense",), left_out={}, **facts)


def state(weights: int, metadata: int = 0) -> dict[str, dict[str, int]]:
    kinds = {"weights": weights, "metadata": metadata, "gradients": weights, "moments": 2 * weights}
    return {"linears": kinds, "adapters": EMPTY, "rest": EMPTY | {"weights": 100}}


def model(name: str, train: float) -> Iterator[Measurement]:
    common = {
        "model": name, "layers": 8, "of_layers": 32, "dtype": "bfloat16", "rank": 64, "rank_share": 0.0156,
        "tokens": 16384, "context": 2048,
        "floor": {kind: {"seconds": 0.4, "bound": "arithmetic"} for kind in ("dense", "sparse")},
    }  # fmt: skip
    both = ("dense", "slope")
    states = {"dense": state(1 << 30), "slope": state(1 << 29, 1 << 27), "slope_adapters": state(1 << 29, 1 << 27)}
    yield measurement(
        "block_train", {"dense": 1.0, "slope": 1 / train, "slope_adapters": 1.04 / train}, both,
        batch=8, state=states, activations={"dense": 1 << 31, "slope": 1 << 30, "slope_adapters": None}, **common,
    )  # fmt: skip
    yield measurement("block_prefill", {"dense": 1.0, "slope": 0.5, "slope_adapters": 0.6}, both, batch=8, **common)
    decode = common | {"tokens": 1}
    yield measurement("block_decode", {"dense": 1.0, "slope": 0.8, "slope_adapters": 0.9}, both, batch=1, **decode)


def others() -> Iterator[Measurement]:
    inference = {name: {"linears": EMPTY | {"weights": bytes_}, "adapters": EMPTY, "rest": EMPTY}
                 for name, bytes_ in (("dense_inference", 1000), ("slope_inference", 562))}  # fmt: skip
    states = {"dense": state(1000), "slope": state(500, 125), "slope_r1.56%": state(500, 125)} | inference
    yield Measurement("memory", {}, {}, {"model": "llama-3-8b", "dtype": "bfloat16", "state": states})
    peaks = {"dense": 8 << 30, "slope": 4 << 30}
    facts: dict[str, Any] = {"model": "gpt2-large", "batch": 4, "context": 1024, "peak": peaks}
    yield Measurement("peak", {}, {}, facts | {"state": {"dense": state(1 << 30), "slope": state(1 << 29)}})
    checks = {
        "forward: linear (rule)": {"passed": True, "error": 0.5, "dense": 0.5},
        "forward: mma_sp": {"passed": False, "error": "inf", "dense": 0.5},
    }
    shape = {"M": 5, "N": 76, "K": 140}
    yield Measurement("correctness", {}, {}, {"dtype": "bfloat16", "shape": shape, "checks": checks, "passed": False})
    errors = {"output": {"slope": 2.2, "dense": 2.0}, "gradients": {"slope": 1.0, "dense": 1.0}}
    yield Measurement("correctness_model", {}, {}, {"errors": errors, "passed": True, "dtype": "bfloat16"})
    tests = {"passed": 99, "failed": 1, "skipped": 2}
    yield Measurement("correctness_tests", {}, {}, {"tests": tests, "passed": False, "dtype": "all"})
    limit = {"dtype": "bfloat16", "bandwidth": 4.1e12, "flops": 7.9e14}
    yield Measurement("limits", {}, {}, limit)
    floor = {kind: {"seconds": 0.25, "bound": "memory"} for kind in ("dense", "sparse")}
    yield measurement(
        "linears_forward", {"dense": 1.0, "slope": 0.625, "slope_adapters": 0.8}, ("dense", "slope"),
        model="llama-3-8b", tokens=1, dtype="bfloat16", floor=floor,
        left_out={"torchao": "ModuleNotFoundError: torchao"},
    )  # fmt: skip
    for seed, gap in ((0, 0.1), (1, 0.3)):
        for variant, loss in (("dense", 2.0), ("exact", 2.0 + gap)):
            facts = {
                "variant": variant, "seed": seed, "validation_loss": loss, "parameters": 1000, "state_bytes": 1 << 20,
                "curve": [3.0, 2.5, loss],
                "settings": {"layers": 4, "width": 128, "steps": 240, "batch": 8, "context": 64, "lr": 3e-3},
            }  # fmt: skip
            yield Measurement("quality", {"step": Summary.of([0.1])}, {}, facts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")

    def run(suite: str, *found: Case) -> None:
        runner.execute(runner.Job(suite, path, f"python -m benchmarks run --suite {suite}", lambda: GPU), found)

    run("kernels", *(Case(f"kernels/m{M}", lambda _, M=M: kernels(M), 1) for M in (1, 4096)))  # type: ignore[misc]
    run(
        "model",
        Case("llama", lambda _: model("llama-3-8b", 1.25), 1),
        Case("opt", lambda _: model("opt-13b", 1.2), 1),
    )

    def the_rest(_: Run) -> Iterator[Measurement]:
        yield from others()

    run("layer", Case("others", the_rest, 1))
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> list[records.Record]:
    return records.read(folder)


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]


def test_goals(found: list[records.Record]) -> None:
    rows = {row[0]: row[1:] for row in cells(bars.table(found, "github"))}
    assert rows["training step, LLaMA-3-8B blocks, 8 x 2048"] == ["at least 1.2", "1.250", "met"]
    assert rows["training step, OPT-13B blocks, 8 x 2048"] == ["at least 1.25", "1.200", "missed"]
    assert rows["prefill, slowest model, 8 x 2048"][1:] == ["2.000", "met"]
    assert rows["decoding at batch 1, linears, slowest model"][1:] == ["1.600", "met"]
    assert rows["decoding at batch 1, blocks, slowest model"][1:] == ["1.250", "missed"]
    assert rows["adapters of rank 1.56 %: share of the step"][1:] == ["0.040", "met"]
    assert rows["training state of the sparse linears"][1:] == ["0.531", "met"]
    assert rows["inference weights of the sparse linears"][1:] == ["0.562", "met"]
    # 0.9 / 1.25: against the faster of the two dense ones.
    assert rows["slowest of everything with default settings"][1:] == ["0.720", "missed"]
    assert {row[-1] for row in cells(bars.table([], "github"))} == {"not measured"}


def test_kernels(found: list[records.Record]) -> None:
    kernel = [record for record in found if record["suite"] == "kernels"]
    summary = {(row[0], row[1]): row[3:] for row in cells(kernel_tables.summary(kernel, "github"))}
    own, tile, tuned = "0.72 (0.72)", "1.80 (1.80)", "1.50 (1.50)"
    assert summary["forward", "1"] == [own, tile, tile, tuned, "0.45 (0.45)", "-"]
    assert summary["grad_input, exact", "1"] == [*["1.00 (1.00)"] * 3, "-", "-", "-"]
    assert summary["grad_input, double-pruned", "4096"] == [*["2.00 (2.00)"] * 3, "-", "4.00 (4.00)", "-"]
    assert summary["forward with adapter", "1"][0] == "1.25 (1.25)"
    worst = {row[0]: row[1:] for row in cells(kernel_tables.worst(kernel, "github"))}
    assert worst["forward"] == ["0.72", "4096 x 4096, 1 tokens, bfloat16", "1 of 2"]
    winners = {(row[0], row[1]): row[2] for row in cells(kernel_tables.winners(kernel, "github"))}
    assert winners["forward", "1"] == "triton_16x64x128 1"
    assert winners["grad_input, double-pruned", "1"] == "cusparselt_double_pruned 1"
    (left_out,) = cells(kernel_tables.left_out(kernel, "github"))
    assert left_out == ["forward: cutlass", "2", "RuntimeError: compute capability 8.x"]
    every = cells(kernel_tables.every_case(kernel, "github"))
    assert every[0][:6] == ["forward", "4096 x 4096", "1", "bfloat16", "900.000", "11% (memory)"]
    assert len(every) == 2 * 5


def test_models(found: list[records.Record]) -> None:
    rows = cells(model_tables.blocks(select.ok(found, *model_tables.BLOCKS), "github"))
    assert rows[0] == [
        "llama-3-8b", "train, 8 x 2048", "8 of 32", "16,384", "20,480", "1.25 (1.25-1.25)", "64 (1.56%)",
        "1.20 (1.20-1.20)", "+4.0%", "40% (arithmetic)", "50% (arithmetic)",
    ]  # fmt: skip
    memory = cells(model_tables.block_memory(select.ok(found, "block_train"), "github"))
    assert memory[0][2:] == ["dense", "1.00", "0.00", "1.00", "2.00", "2.00"]
    assert memory[2][-1] == "-"
    (whole,) = cells(model_tables.memory(select.ok(found, "memory"), "github"))
    assert whole[:4] == ["llama-3-8b", "bfloat16", "0.531", "0.543"]
    (peak,) = cells(model_tables.peaks(select.ok(found, "peak"), "github"))
    assert peak == ["gpt2-large", "4 x 1024", "8.00", "4.00", "4.00", "2.00", "0.500"]


def test_correctness_says_what_failed(found: list[records.Record]) -> None:
    products, compiled, suite = cells(model_tables.correctness(found, "github"))
    assert products == ["products, bfloat16", "2", "1", "1.00", "forward: mma_sp at 5 x 76 x 140"]
    assert compiled[1:] == ["1", "0", "1.10", "none"]
    assert suite == ["test-suite, 2 skipped", "100", "1", "-", "1 tests"]


def test_quality_is_compared_seed_by_seed(found: list[records.Record]) -> None:
    dense, exact = cells(model_tables.quality(select.ok(found, "quality"), "github"))
    assert dense[:5] == ["dense", "2", "2.0000", "0.0000", "+0.0000"]
    assert exact[:6] == ["exact", "2", "2.2000", "0.1414", "+0.2000", "+0.1000 to +0.3000"]


def test_published_figures_stand_beside_ours(found: list[records.Record]) -> None:
    rows = {(row[0], row[1]): row[2:] for row in cells(bars.published(found, "github"))}
    assert rows["llama-3-8b", "training speed-up"][:3] == ["1.25", "1.16", "1.09"]
    assert rows["opt-13b", "training speed-up"][:3] == ["1.20", "1.25", "1.10"]
    assert rows["llama-3-8b", "inference memory"][1] == "0.66"
    assert ("opt-66b", "training speed-up") not in rows
    data = json.loads(bars.PUBLISHED.read_text(encoding="utf-8"))
    used = {entry["source"] for part in ("models", "kernels", "others") for entry in data[part]}
    assert used == set(data["sources"]), "every figure has a source, and every source a figure"


def test_the_whole_report_and_its_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", str(folder), "--plots", str(folder / "plots")]) == 0
    printed = capsys.readouterr().out
    for text in ("Goals.", "driver 580", "Every case", "Who is fastest", "4,100", "ModuleNotFoundError: torchao"):
        assert text in printed
    pictures = {path.name for path in (folder / "plots").iterdir()}
    assert {"kernels-fastest-bfloat16.png", "roofline-bfloat16.png", "memory-models.png", "quality.png"} <= pictures
    section = readme.section(folder)
    assert "Goals." in section
    assert "Every case" not in section, "too long for a README"


def test_goals_are_for_gpus(found: list[records.Record]) -> None:
    cpu = {name: value for name, value in GPU.items() if name != "driver"} | {"cores": 2}
    assert "Goals." not in tables.report([record | {"environment": cpu} for record in found])
