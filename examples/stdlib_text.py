"""Real text that is on every machine: the source files of Python's own standard library, as bytes.

Files are split, not the text: a file is in the training text or in the validation text, whole.  The split
depends on the file's path alone, so a file stays on its side in every Python version; the text itself
differs between versions. Left out are tests, other people's packages, and two folders of generated tables
(``encodings``, ``pydoc_data``), whose files are near-copies of one another and would make the validation
text look easier than it is.  A file whose bytes were seen already (``__init__.py`` files, mostly) is left
out for the same reason.

A batch is a function of the seed and the step.  There is no reader with a position to save: a resumed run
asks for the batch of its next step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_VALIDATION_SHARE = 20
"""One file in this many is for validation."""
_END_OF_FILE = b"\0"
"""Stands after each file; source code has no such byte, so it can mean only this."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two texts, ``uint8`` vectors, and the files they were made from (paths relative to the folder)."""

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


def load(folder: Path | None = None) -> Corpus:
    """Read every ``*.py`` below ``folder`` (default: this Python's standard library).

    Raises:
        ValueError: one of the two sides has no file.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    names: dict[bool, list[str]] = {False: [], True: []}
    seen: set[bytes] = set()
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if _LEFT_OUT & set(relative.parts[:-1]):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        validation = is_validation(relative.as_posix())
        texts[validation].append(content + _END_OF_FILE)
        names[validation].append(relative.as_posix())
    if not texts[False] or not texts[True]:
        raise ValueError(f"{folder}: too few Python files to split into a training and a validation text")
    return Corpus(_bytes(texts[False]), _bytes(texts[True]), tuple(names[False]), tuple(names[True]))


def is_validation(relative: str) -> bool:
    """Whether the file at this relative path is held out; a checksum of the path decides."""
    return zlib.crc32(relative.encode()) % _VALIDATION_SHARE == 0


def batch(text: Tensor, *, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: tokens and targets, both ``[batch, context]`` int64, targets one byte ahead."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{step}".encode()))
    starts = torch.randint(_last_start(text, context) + 1, (batch,), generator=generator)
    return _windows(text, starts, context)


def validation_batches(text: Tensor, *, count: int, batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches of windows spread evenly over the text, the same ones at every call."""
    starts = torch.linspace(0, _last_start(text, context), count * batch, dtype=torch.float64).long()
    return [_windows(text, part, context) for part in starts.view(count, batch)]


def _bytes(parts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def _last_start(text: Tensor, context: int) -> int:
    last = len(text) - context - 1
    if last < 0:
        raise ValueError(f"context: {context} needs a text of at least {context + 1} bytes, got {len(text)}")
    return last


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    # [batch, 1] + [context + 1] -> [batch, context + 1] positions in the text
    window = text[starts[:, None] + torch.arange(context + 1)].long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()
