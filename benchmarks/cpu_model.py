"""Suite cpu, whole models: training steps and decoding."""

from __future__ import annotations

from benchmarks import select
from benchmarks.cases import AUTOCAST, Case, Options
from benchmarks.decode import decode_case
from benchmarks.models import subjects
from benchmarks.training_step import DROP_IN, training_case

BACKWARDS = ("double_pruned", "exact", DROP_IN)
TRAINING = ("float32", AUTOCAST, "bfloat16")
DECODING = ("float32", "bfloat16")
BATCHES = (1, 8)
THREADS = (1, 2)


def cases(options: Options) -> list[Case]:
    found = []
    for subject in subjects(options):
        for threads in options.threads or THREADS:
            for dtype in (dtype for dtype in TRAINING if options.wants(dtype)):
                for backward in BACKWARDS:
                    found.append(training_case(subject, backward, dtype, threads, options))
            for dtype in (dtype for dtype in DECODING if subject.decodes and options.wants(dtype)):
                for batch in BATCHES:
                    found.append(decode_case(subject, batch, dtype, threads, options))
                found.append(decode_case(subject, 1, dtype, threads, options, select.DROP_IN))
    return found
