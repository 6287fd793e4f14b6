"""Tables of results: everything for a reader of a results folder, and the few that the README shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from benchmarks import select
from benchmarks.records import Record

_THROUGHPUT = ("train", "decode")
SHARE = 0.02
"""Goal: what the passes may take of a whole compilation."""


def report(records: Sequence[Record]) -> str:
    """Every table there is something for."""
    from benchmarks import gpu_report

    parts = ["\n".join(select.provenance(records))]
    others = [record for record in records if record["suite"] != "kernels"]
    for setting, group in select.grouped(select.ok(others, *select.PRODUCTS), select.setting).items():
        title = select.titled(*setting)
        parts.append(f"{title}: times faster than eager dense, geometric mean over shapes (worst)\n{summary(group)}")
        for product, rows in select.grouped(group, lambda record: record["name"]).items():
            parts.append(f"{title}: {product}\n{details(rows)}")
    if rows := select.ok(records, "columns"):
        parts.append(f"Second compression\n{columns(rows)}")
    if rows := select.ok(records, *_THROUGHPUT):
        parts.append(f"Models\n{models(rows)}")
    if rows := select.ok(records, "train"):
        parts.append(f"Training state\n{memory(rows)}")
    if rows := select.ok(records, "compile"):
        parts.append(f"Time of the passes: {compilation_goals(rows)}\n{compilation(rows)}")
    parts += [f"{title}\n{table}" for title, table in gpu_report.sections(records, "simple", whole=True)]
    if rows := select.failed(records):
        parts.append(f"Failed\n{failures(rows)}")
    return "\n\n".join(parts)


def summary(records: Sequence[Record], form: str = "simple") -> str:
    """By number of tokens: the speed-up of each product, geometric mean over shapes and the worst of them."""
    present = {
        column: (product, contender)
        for column, (product, contender) in select.COLUMNS.items()
        if any(record["name"] == product for record in records)
    }
    rows = []
    for M, group in sorted(select.grouped(records, lambda record: record["facts"]["shape"]["M"]).items()):
        cells = [str(M)]
        for product, contender in present.values():
            ratios = [select.speedup(r, contender)["median"] for r in group if r["name"] == product]
            cells.append(f"{select.geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "-")
        rows.append(cells)
    return in_columns(rows, ["tokens", *present], form)


def details(records: Iterable[Record], form: str = "simple") -> str:
    """One row a case: the dense time, and how many times faster each contender is (first to third quartile)."""
    rows = []
    names: list[str] = []
    for record in records:
        names = [name for name in record["seconds"] if name != "dense"]
        rows.append(
            [
                select.shape(record),
                str(record["facts"]["shape"]["M"]),
                milliseconds(record["seconds"]["dense"]["median"]),
                *(with_quartiles(select.speedup(record, name)) for name in names),
                str(record["seconds"]["dense"]["n"]),
            ]
        )
    return in_columns(rows, ["N x K", "tokens", "dense, ms", *names, "rounds"], form)


def columns(records: Iterable[Record], form: str = "simple") -> str:
    """Times of the second compression."""
    rows = [
        [
            select.shape(record),
            record["facts"]["dtype"],
            str(record["threads"]),
            *(milliseconds(seconds["median"]) for seconds in record["seconds"].values()),
        ]
        for record in records
    ]
    return in_columns(rows, ["N x K", "dtype", "threads", "copy, ms", "pick, ms", "compress, ms"], form)


def models(records: Iterable[Record], form: str = "simple") -> str:
    """Tokens per second, dense and ours."""
    rows = []
    for record in records:
        facts, name = record["facts"], select.ours(record)
        tokens = {c: facts["tokens"] / s["median"] for c, s in record["seconds"].items()}
        train = record["name"] == "train"
        way = name.removeprefix("slope").removeprefix("_")
        what = f"train, {way}" if train else f"decode, batch {facts['batch']}" + (f", {way}" if way else "")
        frozen = record["speedup"][name].get("frozen")
        rows.append(
            [
                facts["model"],
                what.replace("_", "-"),
                facts["dtype"],
                str(record["threads"]),
                f"{tokens['dense']:,.1f}",
                f"{tokens[name]:,.1f}",
                with_quartiles(select.speedup(record, name)),
                "-" if frozen is None else with_quartiles(frozen),
            ]
        )
    headers = ["model", "what", "dtype", "threads", "dense, tokens/s", "SLoPe, tokens/s", "faster", "than frozen dense"]
    return in_columns(rows, headers, form)


def memory(records: Iterable[Record], form: str = "simple") -> str:
    """Bytes of training state: of the linears that are sparse, and of the whole model."""
    rows = {}
    for record in records:
        name = select.ours(record)

        def total(contender: str, groups: Sequence[str], record: Record = record) -> int:
            return sum(sum(select.state_bytes(record, contender, group).values()) for group in groups)

        cells = [record["facts"]["model"], record["facts"]["dtype"], name.removeprefix("slope_").replace("_", "-")]
        for groups in (("linears",), ("linears", "adapters", "rest")):
            dense, sparse = total("dense", groups), total(name, groups)
            cells += [f"{dense / 2**20:,.2f}", f"{sparse / 2**20:,.2f}", f"{sparse / dense:.3f}"]
        rows[tuple(cells[:3])] = cells  # Threads make no difference to bytes.
    headers = ["model", "dtype", "backward", "sparse linears: dense, MiB", "SLoPe, MiB", "ratio"]
    return in_columns(list(rows.values()), [*headers, "whole: dense, MiB", "SLoPe, MiB", "ratio"], form)


def compilation(records: Iterable[Record], form: str = "simple") -> str:
    """Seconds of the passes by size of the graph, and their share of a whole compilation where one was run."""
    rows = []
    for record in records:
        facts, passes, whole = record["facts"], record["seconds"]["passes"], record["seconds"].get("compilation")
        rows.append(
            [
                facts["model"],
                str(facts["nodes"]),
                str(facts["linears"]),
                f"{passes['median']:.2f}",
                f"{passes['median'] / facts['nodes'] * 1e3:.2f}",
                "-" if whole is None else f"{whole['median']:.1f}",
                "-" if whole is None else f"{passes['median'] / whole['median']:.1%}",
            ]
        )
    headers = ["model", "nodes", "sparse linears", "passes, s", "ms a node", "forward + backward compiled, s", "share"]
    return in_columns(rows, headers, form)


def compilation_goals(records: Sequence[Record]) -> str:
    """The two goals beside what was measured: the share of the passes, and that they are linear in the nodes."""
    parts = []
    for record in (r for r in records if "compilation" in r["seconds"]):
        share = record["seconds"]["passes"]["median"] / record["seconds"]["compilation"]["median"]
        verdict = "met" if share < SHARE else "missed"
        parts.append(f"share in {record['facts']['model']} {share:.1%} (goal: under {SHARE:.0%}, {verdict})")
    each = {r["facts"]["nodes"]: r["seconds"]["passes"]["median"] / r["facts"]["nodes"] for r in records}
    if len(each) > 1:
        small, large = min(each), max(each)
        parts.append(f"a node of {large:,} takes {each[large] / each[small]:.2f} times as long as one of {small:,}")
    return "; ".join(parts)


def failures(records: Iterable[Record]) -> str:
    """The last line of each traceback; the results file has all of it."""
    rows = [[record["case"], record["error"].strip().splitlines()[-1]] for record in records]
    return in_columns(rows, ["case", "error"], "simple")


def in_columns(rows: Sequence[Sequence[str]], headers: Sequence[str], form: str) -> str:
    # Right-aligned figures, left-aligned words: the first row says which column is which.
    words = [not cell[:1].isdigit() or " x " in cell for cell in rows[0]] if rows else [True] * len(headers)
    return tabulate(
        rows,
        headers=headers,
        tablefmt=form,
        disable_numparse=True,
        colalign=["left" if word else "right" for word in words],
    )


def with_quartiles(summary: dict[str, float]) -> str:
    return f"{summary['median']:.2f} ({summary['low']:.2f}-{summary['high']:.2f})"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
