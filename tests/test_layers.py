"""The shape of the library, read from its source text: who imports whom, and habits without another guard.

Imports run one way::

    entry points (slope_compile/*)  ->  passes  ->  kernels  ->  leaves

A file may import its own layer and those to its right.  Nothing is imported here; a file that does not import
at all (no Triton, no GPU) is checked like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEAVES = frozenset({"config", "cost", "errors", "log", "pattern", "report", "rules"})
"""Modules directly in ``slope_compile`` that every layer may import, and that import only each other."""

REACH = {
    "leaf": {"leaf"},
    "kernels": {"leaf", "kernels"},
    "passes": {"leaf", "kernels", "passes"},
    "entry point": {"leaf", "kernels", "passes", "entry point"},
}
"""Which layers each layer may import."""

MAX_LINES = 450

PRIVATE_PUBLICLY_NAMED = ("torch.fx.experimental",)
"""Private by torch's own account, though no underscore says so."""

LIBRARY = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("slope_compile", "passes", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    # A walk may or may not follow the links slope_compile/passes and slope_compile/kernels: count files once.
    if not (folder == "slope_compile" and path.relative_to(ROOT / folder).parts[0] in ("passes", "kernels"))
}
"""Each file of the library once, by its path in the repository."""

EVERYWHERE = LIBRARY | {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("tests", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

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


def module_name(path: str) -> str:
    """``passes/fuse.py`` -> ``slope_compile.passes.fuse``, the name it is imported by."""
    parts = list(Path(path).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "slope_compile" else ["slope_compile", *parts])


def layer(module: str) -> str:
    """The layer of a dotted name in ``slope_compile``; the package re-exports entry points and so is one."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in ("passes", "kernels"):
        return parts[1]
    return "leaf" if len(parts) > 1 and parts[1] in LEAVES else "entry point"


def target(found: Import, modules: frozenset[str]) -> str | None:
    """The module of ours that an import reaches, if any; ``from slope_compile import errors``: errors."""
    if found.module.split(".")[0] != "slope_compile":
        return None
    whole = f"{found.module}.{found.member}"
    return whole if found.member is not None and whole in modules else found.module


def upward_imports(path: str, source: str, modules: frozenset[str]) -> list[str]:
    """One message for each import in ``source`` that runs against the arrows, or is relative."""
    importer = module_name(path)
    problems = []
    for found in imports(ast.parse(source)):
        if found.level:
            what = f"'{found.module}.{found.member}'"
            problems.append(f"{path}:{found.line}: relative import of {what}; write it absolute")
            continue
        imported = target(found, modules)
        own = layer(importer)
        if imported is not None and layer(imported) not in REACH[own]:
            problems.append(
                f"{path}:{found.line}: {importer} ({own}) imports {imported} ({layer(imported)}); "
                f"a file of layer '{own}' may import only: {', '.join(sorted(REACH[own]))}"
            )
    return problems


def private_part(dotted: str) -> str | None:
    """The shortest private prefix of a dotted name of torch's: ``torch._ops.OpOverload`` -> ``torch._ops``.

    Names under ``torch.ops`` are operators, and an operator such as ``aten._to_copy`` is public in a graph.
    """
    parts = dotted.split(".")
    if parts[0] != "torch" or parts[1:2] == ["ops"]:
        return None
    for end in range(2, len(parts) + 1):
        last = parts[end - 1]
        prefix = ".".join(parts[:end])
        if prefix in PRIVATE_PUBLICLY_NAMED or (last.startswith("_") and not last.startswith("__")):
            return prefix
    return None


def attribute_chain(node: ast.expr) -> str | None:
    """``a.b.c`` as text, or None for an expression that is not a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = attribute_chain(node.value)
        return None if head is None else f"{head}.{node.attr}"
    return None


def private_torch(path: str, source: str) -> list[str]:
    """One message for each private torch module that a file not named ``_*.py`` imports or reaches.

    Private names move between releases; kept in one file a concern, a new torch breaks that file alone.
    An attribute behind a private name counts (``torch._dynamo.reset``), a function of torch itself with an
    underscore (``torch._check``) does not.
    """
    file = Path(path).name
    if file.startswith("_") and file != "__init__.py":
        return []
    tree = ast.parse(source)
    dotted = [
        (found.line, found.module if found.member is None else f"{found.module}.{found.member}")
        for found in imports(tree)
        if not found.level
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := attribute_chain(node.value)) is not None:
            dotted.append((node.lineno, chain))
    reached = {(line, private) for line, text in dotted if (private := private_part(text)) is not None}
    return [
        f"{path}:{line}: {private} is private to torch; only files named _*.py may use it"
        for line, private in sorted(reached)
    ]


def top_level_imports(path: str, source: str) -> list[str]:
    """One message for each ``import kernels`` or ``import passes``: neither name is ours at the top level."""
    return [
        f"{path}:{found.line}: imports top-level '{found.module}'; ours is slope_compile.{found.module}"
        for found in imports(ast.parse(source))
        if not found.level and found.module.split(".")[0] in ("kernels", "passes")
    ]


def prints(path: str, source: str) -> list[str]:
    """One message for each call of ``print``: a library reports through return values and logging."""
    return [
        f"{path}:{node.lineno}: print() in the library; return the text or log it"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


MODULES = frozenset(module_name(path) for path in LIBRARY)


def fail_if_any(problems: list[str]) -> None:
    """Fail with the messages alone, without a traceback into this file."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_the_library_is_where_these_tests_look() -> None:
    folders = {Path(name).parts[0] for name in LIBRARY}
    assert folders == {"slope_compile", "passes", "kernels"}
    missing = sorted(leaf for leaf in LEAVES if f"slope_compile.{leaf}" not in MODULES)
    assert not missing, f"LEAVES names modules that do not exist: {missing}"


@library_files
def test_imports_run_one_way(name: str) -> None:
    fail_if_any(upward_imports(name, LIBRARY[name].read_text(encoding="utf-8"), MODULES))


@library_files
def test_private_torch_names_stay_in_underscore_files(name: str) -> None:
    fail_if_any(private_torch(name, LIBRARY[name].read_text(encoding="utf-8")))


@library_files
def test_no_print(name: str) -> None:
    fail_if_any(prints(name, LIBRARY[name].read_text(encoding="utf-8")))


@library_files
def test_file_is_short(name: str) -> None:
    lines = len(LIBRARY[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines, more than {MAX_LINES}: split it by concern"


@pytest.mark.parametrize("name", sorted(EVERYWHERE))
def test_no_top_level_kernels_or_passes(name: str) -> None:
    fail_if_any(top_level_imports(name, EVERYWHERE[name].read_text(encoding="utf-8")))


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_folder_is_linked_and_not_a_regular_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py makes {folder} a top-level package wherever the repository is on sys.path; "
        "a regular package named kernels would hide Hugging Face's from transformers"
    )
    link = ROOT / "slope_compile" / folder
    assert link.is_symlink(), f"slope_compile/{folder} is not a link to ../{folder}"
    assert link.readlink() == Path("..") / folder


SYNTHETIC = frozenset(
    f"slope_compile{tail}"
    for tail in (
        *("", ".errors", ".config", ".backend"),
        *(".passes.fuse", ".passes.graph", ".kernels.ops", ".kernels.metadata"),
    )
)


@pytest.mark.parametrize(
    ("path", "source", "both_ends"),
    [
        pytest.param(
            "kernels/ops.py",
            "from slope_compile.passes.fuse import Fuse",
            ("slope_compile.kernels.ops (kernels)", "slope_compile.passes.fuse (passes)"),
            id="kernels_import_a_pass",
        ),
        pytest.param(
            "kernels/ops.py",
            "def f():\n    import slope_compile.backend",
            ("slope_compile.kernels.ops (kernels)", "slope_compile.backend (entry point)"),
            id="inside_a_function",
        ),
        pytest.param(
            "passes/fuse.py",
            "from slope_compile import backend",
            ("slope_compile.passes.fuse (passes)", "slope_compile.backend (entry point)"),
            id="module_from_the_package",
        ),
        pytest.param(
            "passes/fuse.py",
            "from slope_compile import SlopeConfig",
            ("slope_compile.passes.fuse (passes)", "slope_compile (entry point)"),
            id="re_exported_name",
        ),
        pytest.param(
            "slope_compile/errors.py",
            "from slope_compile.kernels import metadata",
            ("slope_compile.errors (leaf)", "slope_compile.kernels.metadata (kernels)"),
            id="leaf_imports_kernels",
        ),
        pytest.param(
            "slope_compile/config.py",
            "if TYPE_CHECKING:\n    from slope_compile.backend import slope",
            ("slope_compile.config (leaf)", "slope_compile.backend (entry point)"),
            id="for_types_only",
        ),
        pytest.param(
            "passes/fuse.py",
            "from .graph import users",
            ("passes/fuse.py:1", "relative import of 'graph.users'"),
            id="relative",
        ),
    ],
)
def test_an_upward_import_is_found_and_both_ends_named(
    path: str, source: str, both_ends: tuple[str, str]
) -> None:
    (message,) = upward_imports(path, source, SYNTHETIC)
    assert all(end in message for end in both_ends), message


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("slope_compile/backend.py", "from slope_compile.passes.fuse import Fuse"),
        ("slope_compile/backend.py", "import slope_compile.kernels.ops"),
        ("slope_compile/__init__.py", "from slope_compile.backend import slope"),
        ("passes/fuse.py", "from slope_compile.passes.graph import users\nfrom slope_compile import errors"),
        ("kernels/ops.py", "from slope_compile.kernels import metadata\nimport torch\nimport slopes"),
        ("slope_compile/config.py", "from slope_compile.errors import ConfigError"),
    ],
)
def test_a_downward_import_is_fine(path: str, source: str) -> None:
    assert upward_imports(path, source, SYNTHETIC) == []


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._inductor import config", "torch._inductor"),
        ("from torch import _guards", "torch._guards"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree"),
        ("from torch.fx.experimental.symbolic_shapes import guard_or_false", "torch.fx.experimental"),
        ("from torch.fx import experimental", "torch.fx.experimental"),
        ("import torch\ntorch._dynamo.reset()", "torch._dynamo"),
        ("import torch\nx: torch._ops.OpOverload", "torch._ops"),
        ("import torch\ntorch.utils._pytree.tree_map(f, x)", "torch.utils._pytree"),
        ("import torch\nf(torch.fx.experimental.symbolic_shapes.guard)", "torch.fx.experimental"),
    ],
)
def test_a_private_torch_name_is_found(source: str, named: str) -> None:
    (message,) = private_torch("passes/fuse.py", source)
    assert named in message
    assert private_torch("passes/_torch.py", source) == []


def test_public_torch_names_are_fine() -> None:
    source = """
import torch
from torch.fx.passes.infra.pass_base import PassBase
from slope_compile._dynamo import reset
torch._check(x, torch.__version__)
torch.ops.aten._to_copy.default
"""
    assert private_torch("passes/fuse.py", source) == []


def test_an_init_file_is_no_home_for_private_names() -> None:
    assert private_torch("slope_compile/__init__.py", "import torch._dynamo") != []


def test_prints_and_top_level_imports_are_found() -> None:
    assert prints("passes/fuse.py", "def f():\n    print(1)\n    pprint(2)") == [
        "passes/fuse.py:2: print() in the library; return the text or log it"
    ]
    assert len(top_level_imports("a.py", "import kernels\nfrom passes.fuse import Fuse")) == 2
    source = "import slope_compile.kernels.ops\nfrom slope_compile import kernels"
    assert top_level_imports("a.py", source) == []
