"""The shape of the library, read from its source text: who imports whom, and habits without another guard.

Imports run one way::

    entry points (slope_compile/*)  ->  passes  ->  kernels  ->  leaves

A file may import its own layer and those to its right.  Nothing is imported here; a file that does not import
at all (no Triton, no GPU) is checked like any other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from library_source import LIBRARY, ROOT, Import, fail_if_any, imports, library_files

LEAVES = frozenset({"_symbols", "config", "cost", "dtypes", "errors", "log", "pattern", "report", "rules"})
"""Modules directly in ``slope_compile`` that every layer may import, and that import only each other."""

REACH = {
    "leaf": {"leaf"},
    "kernels": {"leaf", "kernels"},
    "passes": {"leaf", "kernels", "passes"},
    "entry point": {"leaf", "kernels", "passes", "entry point"},
}
"""Which layers each layer may import."""

MAX_LINES = 450

EVERYWHERE = LIBRARY | {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("tests", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

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

def test_the_library_is_where_these_tests_look() -> None:
    folders = {Path(name).parts[0] for name in LIBRARY}
    assert folders == {"slope_compile", "passes", "kernels"}
    missing = sorted(leaf for leaf in LEAVES if f"slope_compile.{leaf}" not in MODULES)
    assert not missing, f"LEAVES names modules that do not exist: {missing}"


@library_files
def test_imports_run_one_way(name: str) -> None:
    fail_if_any(upward_imports(name, LIBRARY[name].read_text(encoding="utf-8"), MODULES))


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


def test_prints_and_top_level_imports_are_found() -> None:
    assert prints("passes/fuse.py", "def f():\n    print(1)\n    pprint(2)") == [
        "passes/fuse.py:2: print() in the library; return the text or log it"
    ]
    assert len(top_level_imports("a.py", "import kernels\nfrom passes.fuse import Fuse")) == 2
    source = "import slope_compile.kernels.ops\nfrom slope_compile import kernels"
    assert top_level_imports("a.py", source) == []
