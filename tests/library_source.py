"""The library's source text, and what the tests that read it share."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

LIBRARY = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("slope_compile", "passes", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    # A walk may or may not follow the links slope_compile/passes and slope_compile/kernels: count files once.
    if not (folder == "slope_compile" and path.relative_to(ROOT / folder).parts[0] in ("passes", "kernels"))
}
"""Each file of the library once, by its path in the repository."""


library_files = pytest.mark.parametrize("name", sorted(LIBRARY))


class Import(NamedTuple):
    """One imported name: ``from a.b import c`` has module a.b and member c, ``import a.b`` has no member."""

    line: int
    module: str
    member: str | None
    level: int


def imports(tree: ast.AST) -> Iterator[Import]:
    """Every import in a file, those inside functions and ``TYPE_CHECKING`` blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None, 0)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(node.lineno, node.module or "", alias.name, node.level)


def attribute_chain(node: ast.expr) -> str | None:
    """``a.b.c`` as text, or None for an expression that is not a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = attribute_chain(node.value)
        return None if head is None else f"{head}.{node.attr}"
    return None


def fail_if_any(problems: list[str]) -> None:
    """Fail with the messages alone, without a traceback into this file."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
