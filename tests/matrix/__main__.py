"""The command line: ``python -m tests.matrix run`` and ``python -m tests.matrix report``."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import re
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # files there import each other by their own names

import machine
from matrix import cells, models, table


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Coverage of models and modes.")
    commands = parser.add_subparsers(required=True, metavar="run | report")
    run = commands.add_parser("run", help="run cells and write their results")
    run.set_defaults(function=_run)
    run.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="cells MODEL/MODE")
    run.add_argument("--missing", action="store_true", help="leave out cells that are in the results and passed")
    run.add_argument("--compiler", default="aot_eager", choices=("eager", "aot_eager", "inductor"))
    run.add_argument("--out", type=Path, default=table.RESULTS, help="file of the results")
    report = commands.add_parser("report", help="the README's section")
    report.set_defaults(function=_report)
    report.add_argument("--readme", type=Path, metavar="FILE", help="rewrite its section; default: print it")
    given = parser.parse_args()
    status: int = given.function(given)
    return status


def _run(given: argparse.Namespace) -> int:
    logging.disable(logging.WARNING)  # way A says for each graph what it prunes
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else generate() asks the hub for a model's own code
    failed = 0
    for model in models.MODELS:
        for mode in cells.MODES:
            name = f"{model.name}/{mode}"
            known = table.read(given.out).get(name, {})
            if mode in model.skipped or not given.only.search(name):
                continue
            if given.missing and known.get("status") == "ok":
                continue
            begin = time.perf_counter()
            found = _cell(model, mode, given.compiler)
            failed += found["status"] != "ok"
            print(f"{name}: {found['status']}, {time.perf_counter() - begin:.1f} s", flush=True)
            table.write(table.read(given.out) | {name: found}, given.out)
    return int(failed > 0)


def _cell(model: models.Model, mode: str, compiler: str) -> dict[str, object]:
    versions = {
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "compiler": compiler,
        "commit": machine.commit()["commit"],
    }
    torch.manual_seed(0)
    try:
        cell = cells.fill(model, mode, compiler)
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "error": str(error)[:300], **versions}
    counts = {"sparse": cell.sparse, "eligible": cell.eligible, "graphs": cell.graphs, "dense": cell.reasons}
    return {"status": "ok", **counts, **versions}


def _report(given: argparse.Namespace) -> int:
    results = table.read()
    if given.readme is None:
        print(table.section(results))
        return 0
    given.readme.write_text(table.updated(given.readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
