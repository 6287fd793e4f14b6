"""The suites correctness, kernels, layer, model, memory and quality in a report: titles and tables, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import bars, kernel_tables, model_tables, select
from benchmarks.records import Record


def sections(records: Sequence[Record], form: str, whole: bool) -> Iterator[tuple[str, str]]:
    """What there is something for.

    Args:
        whole: with the tables that have a row for every case; without them is what a README can hold.
    """
    if rows := select.ok(records, "correctness", "correctness_model", "correctness_tests"):
        yield "Correctness on the device, against float64.", model_tables.correctness(rows, form)
    if on_gpu := [record for record in records if "driver" in record["environment"]]:
        yield "Goals.", bars.table(on_gpu, form)
    if rows := select.ok(records, "limits"):
        yield "Limits of the device, measured.", kernel_tables.limits(rows, form)
    kernels = select.ok([r for r in records if r["suite"] == "kernels"], *select.PRODUCTS, "low_rank")
    if kernels:
        yield from _kernels(kernels, form, whole)
    if rows := select.ok(records, "linears_forward", "linears_train"):
        yield "Linears of a block, compiled (first to third quartile).", kernel_tables.linears(rows, form)
        if whole and any(r["facts"]["left_out"] for r in rows):
            yield "Not in that comparison.", kernel_tables.left_out(rows, form)
    if rows := select.ok(records, *model_tables.BLOCKS):
        yield "Transformer blocks, compiled on both sides (first to third quartile).", model_tables.blocks(rows, form)
    if rows := select.ok(records, "block_train"):
        yield "Memory of a training step on blocks.", model_tables.block_memory(rows, form)
    if rows := select.ok(records, "memory"):
        title = (
            "State of whole models as a share of dense, embeddings and head included: measured with one and two blocks "
            "and continued to the model's depth; AdamW, moments in the weights' dtype."
        )
        yield title, model_tables.memory(rows, form)
    if (rows := select.ok(records, "peak")) and any(r["facts"]["peak"]["dense"] for r in rows):
        yield "Peak memory of a training step at full depth.", model_tables.peaks(rows, form)
    if table := bars.published(records, form):
        yield f"Measured here, and published for an A100-40GB ({bars.sources()[0]}).", table
    if rows := select.ok(records, "quality"):
        title = (
            f"Loss after short pretraining: {model_tables.quality_setting(rows[0])}. So short a run shows which "
            "variants begin to learn faster, not which end better: compare the dense model of half the blocks "
            "(dense_half)."
        )
        yield title, model_tables.quality(rows, form)


def _kernels(kernels: Sequence[Record], form: str, whole: bool) -> Iterator[tuple[str, str]]:
    yield (
        "Products against the best dense one (cuBLAS, or torch.compile with max-autotune where it was measured): "
        "geometric mean over shapes (worst).",
        kernel_tables.summary(kernels, form),
    )
    yield "Slowest cases.", kernel_tables.worst(kernels, form)
    if whole:
        yield "Who is fastest.", kernel_tables.winners(kernels, form)
        yield "Every case (first to third quartile).", kernel_tables.every_case(kernels, form)
        if any(r["facts"].get("left_out") for r in kernels):
            yield "Not in these comparisons.", kernel_tables.left_out(kernels, form)
