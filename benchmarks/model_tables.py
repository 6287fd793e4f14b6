"""Tables of the suites model, memory, correctness and quality."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import select
from benchmarks.kernel_tables import share_of_limit
from benchmarks.memory_state import total
from benchmarks.records import Record
from benchmarks.tables import in_columns, with_quartiles

BLOCKS = ("block_train", "block_prefill", "block_decode")
_GIB = 2**30
_LIMITED = (("dense", "dense"), ("sparse", "slope"))
"""Kind of work -> the contender that is held against its limit."""


def blocks(records: Iterable[Record], form: str = "simple") -> str:
    """Tokens per second of blocks, and what adapters cost."""
    rows = []
    for record in records:
        facts, seconds = record["facts"], record["seconds"]
        what = record["name"].removeprefix("block_")
        size = f"batch {facts['batch']}" if what == "decode" else f"{facts['batch']} x {facts['context']}"
        rows.append(
            [
                facts["model"],
                f"{what}, {size}",
                f"{facts['layers']} of {facts['of_layers']}",
                f"{facts['tokens'] / seconds['dense']['median']:,.0f}",
                f"{facts['tokens'] / seconds['slope']['median']:,.0f}",
                with_quartiles(select.speedup(record, "slope")),
                f"{facts['rank']} ({facts['rank_share']:.2%})",
                with_quartiles(select.speedup(record, "slope_adapters")),
                f"{adapter_cost(record):+.1%}",
                *(share_of_limit(facts["floor"][kind], seconds[name]) for kind, name in _LIMITED),
            ]
        )
    headers = ["model", "what", "blocks", "dense, tokens/s", "SLoPe, tokens/s", "times faster", "rank", "with adapters"]
    headers += ["adapters cost", "linears' limit, dense", "linears' limit, SLoPe"]
    return in_columns(rows, headers, form)


def adapter_cost(record: Record) -> float:
    """Time that the adapters add to the sparse step, as a share of it."""
    return 1 / select.speedup(record, "slope_adapters", "slope")["median"] - 1


def block_memory(records: Iterable[Record], form: str = "simple") -> str:
    """Of training steps on blocks: the state by kind, and the most that activations and temporaries took."""
    rows = []
    for record in records:
        for contender, state in record["facts"]["state"].items():
            kinds = {
                kind: sum(group[kind] for group in state.values())
                for kind in ("weights", "metadata", "gradients", "moments")
            }
            activations = record["facts"]["activations"][contender]
            cells = [record["facts"]["model"], f"{record['facts']['batch']} x {record['facts']['context']}", contender]
            cells += [f"{count / _GIB:.2f}" for count in kinds.values()]
            rows.append([*cells, "-" if activations is None else f"{activations / _GIB:.2f}"])
    headers = ["model", "batch", "contender", "weights, GiB", "metadata", "gradients", "moments", "activations"]
    return in_columns(rows, headers, form)


def memory(records: Iterable[Record], form: str = "simple") -> str:
    """Whole models at their own depth: training state and inference weights, as a share of dense."""
    rows = []
    for record in records:
        state = record["facts"]["state"]
        cells = [record["facts"]["model"], record["facts"]["dtype"]]
        for groups in (("linears",), ()):
            cells.append(f"{total(state['slope'], *groups) / total(state['dense'], *groups):.3f}")
        cells += [f"{total(state[n]) / total(state['dense']):.3f}" for n in state if n.startswith("slope_r")]
        for groups in (("linears",), ()):
            share = total(state["slope_inference"], *groups) / total(state["dense_inference"], *groups)
            cells.append(f"{share:.3f}")
        rows.append([*cells, f"{total(state['dense']) / _GIB:.2f}"])
    headers = ["model", "dtype", "training: sparse linears", "whole model", "r 1.56 %", "r 6.25 %"]
    return in_columns(rows, [*headers, "inference: sparse linears", "whole model", "dense, GiB"], form)


def peaks(records: Iterable[Record], form: str = "simple") -> str:
    """What PyTorch's allocator counted at most in a training step at full depth."""
    rows = []
    for record in records:
        facts = record["facts"]
        if facts["peak"]["dense"] is None:
            continue
        cells = [facts["model"], f"{facts['batch']} x {facts['context']}"]
        for contender in ("dense", "slope"):
            peak, state = facts["peak"][contender], total(facts["state"][contender])
            cells += [f"{peak / _GIB:.2f}", f"{(peak - state) / _GIB:.2f}"]
        rows.append([*cells, f"{facts['peak']['slope'] / facts['peak']['dense']:.3f}"])
    headers = ["model", "batch", "dense: peak, GiB", "not state", "SLoPe: peak, GiB", "not state", "ratio of peaks"]
    return in_columns(rows, headers, form)


def correctness(records: Sequence[Record], form: str = "simple") -> str:
    """How many checks passed; the largest error as a multiple of the dense one's; what failed, by name."""
    rows = []
    for dtype, group in select.grouped(select.ok(records, "correctness"), lambda r: r["facts"]["dtype"]).items():
        checks = [(r, name, check) for r in group for name, check in r["facts"]["checks"].items()]
        ratios = [c["error"] / c["dense"] for _, _, c in checks if isinstance(c.get("error"), float) and c["dense"]]
        failed = [f"{name} at {_size(r)}" for r, name, check in checks if not check["passed"]]
        rows.append(_row(f"products, {dtype}", len(checks), failed, max(ratios, default=0.0)))
    for record in select.ok(records, "correctness_model"):
        errors, facts = record["facts"]["errors"], record["facts"]
        ratio = max(e["slope"] / e["dense"] for e in errors.values())
        name = record["case"].removeprefix("correctness/")
        rows.append(_row(name, 1, [] if facts["passed"] else [name], ratio))
    for record in select.ok(records, "correctness_tests"):
        tests = record["facts"]["tests"]
        count = tests.get("passed", 0) + tests.get("failed", 0)
        failed = [] if record["facts"]["passed"] else [f"{tests.get('failed', 0)} tests"]
        rows.append(_row(f"test-suite, {tests.get('skipped', 0)} skipped", count, failed, None))
    return in_columns(rows, ["what", "checks", "failed", "largest error / dense's", "which failed"], form)


def _row(what: str, count: int, failed: list[str], ratio: float | None) -> list[str]:
    names = ", ".join(failed[:4]) + (f" and {len(failed) - 4} more" if len(failed) > 4 else "")
    return [what, str(count), str(len(failed)), "-" if ratio is None else f"{ratio:.2f}", names or "none"]


def _size(record: Record) -> str:
    shape = record["facts"]["shape"]
    return f"{shape['M']} x {shape['N']} x {shape['K']}"


def quality(records: Sequence[Record], form: str = "simple") -> str:
    """Validation loss by variant: mean over seeds, their spread, and the mean difference to dense of the same seed."""
    rows = []
    for variant, group in select.grouped(records, lambda r: r["facts"]["variant"]).items():
        losses = [r["facts"]["validation_loss"] for r in group]
        gaps = loss_gaps(records, group)
        rows.append(
            [
                variant,
                str(len(group)),
                f"{statistics.fmean(losses):.4f}",
                f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-",
                f"{statistics.fmean(gaps):+.4f}" if gaps else "-",
                f"{min(gaps):+.4f} to {max(gaps):+.4f}" if gaps else "-",
                f"{group[0]['facts']['parameters']:,}",
                f"{group[0]['facts']['state_bytes'] / 2**20:.1f}",
            ]
        )
    headers = ["variant", "seeds", "validation loss", "deviation", "minus dense", "range", "parameters", "state, MiB"]
    return in_columns(rows, headers, form)


def loss_gaps(records: Sequence[Record], group: Sequence[Record]) -> list[float]:
    """Validation losses of a group minus that of the dense run with the same seed, where there is one."""
    dense = {r["facts"]["seed"]: r["facts"]["validation_loss"] for r in records if r["facts"]["variant"] == "dense"}
    facts = [record["facts"] for record in group if record["facts"]["seed"] in dense]
    return [fact["validation_loss"] - dense[fact["seed"]] for fact in facts]


def quality_setting(record: Record) -> str:
    """What the runs were, in words."""
    settings: dict[str, Any] = record["facts"]["settings"]
    return (
        f"GPT of {settings['layers']} x {settings['width']}, {settings['steps']} steps of {settings['batch']} x "
        f"{settings['context']} bytes, learning rate {settings['lr']:g}"
    )
