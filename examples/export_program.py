"""Export a model, make the exported program sparse, save it, load it, and train what was loaded.

    python examples/export_program.py

No model class is needed after the export: the ``.pt2`` file holds the graph with its sparse products and the compressed
weights.  Whoever loads it only has to import ``slope_compile``, which registers the operators.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch.export import Dim
from torch.fx import GraphModule

import slope_compile as slope
from gpt import GPT, GPTConfig


def state_bytes(program: torch.export.ExportedProgram) -> int:
    """Bytes of everything that the program carries."""
    return sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/export", help="folder for the saved programs")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30, help="training steps on the loaded program")
    given = parser.parse_args(arguments)
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, width=given.width, heads=4, context=64))
    tokens = torch.randint(0, 256, (4, 64))
    batch = Dim("batch", min=1, max=1024)
    inputs = (tokens, tokens.roll(-1, dims=1))
    dense = torch.export.export(model, inputs, dynamic_shapes=({0: batch}, {0: batch}))
    config = slope.SlopeConfig(adapter_rank=8, column_refresh="backward")
    sparse = slope.transform(dense, config)
    print(sparse.graph_module.meta["slope_report"])

    files = {"dense": folder / "dense.pt2", "2:4": folder / "sparse.pt2"}
    torch.export.save(dense, files["dense"])
    torch.export.save(sparse, files["2:4"])
    table = [
        (name, state_bytes(program), files[name].stat().st_size)
        for name, program in (("dense", dense), ("2:4", sparse))
    ]
    print("\n" + tabulate(table, headers=("program", "state bytes", "file bytes")))

    loaded = torch.export.load(files["2:4"]).module()
    assert isinstance(loaded, GraphModule)
    assert torch.equal(loaded(*inputs), sparse.module()(*inputs)), "a loaded program computes what was saved"

    # Training it is a plain loop; the schedule inserts the adapter nodes in the loaded graph near the end.
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=3e-3)
    schedule = slope.AdapterSchedule(loaded, total_steps=given.steps, fraction=0.2)
    nodes = len(loaded.graph.nodes)
    losses = []
    for _ in range(given.steps):
        loss = loaded(*inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss.detach()))
    assert math.isfinite(losses[-1])
    print(f"\ntrained the loaded program: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {given.steps} steps")
    print(f"adapters came on after step {schedule.start_step}: {nodes} -> {len(loaded.graph.nodes)} graph nodes")


if __name__ == "__main__":
    main()
