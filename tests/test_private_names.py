"""Private names of PyTorch and others stay in the few files that say so: a new release can break these alone.

Nothing is imported here; the library is read as text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from library_source import LIBRARY, attribute_chain, fail_if_any, imports, library_files

PRIVATE_PUBLICLY_NAMED = ("torch.fx.experimental",)
"""Private by torch's own account, though no underscore says so."""

PRIVATE_MODULES = {
    "torch._C": "passes/_higher_order slope_compile/_dynamo slope_compile/_transforms kernels/_autocast "
    "kernels/_cusparselt",
    "torch._dynamo": "slope_compile/_dynamo slope_compile/_inductor",
    "torch._guards": "slope_compile/_dynamo",
    "torch._inductor": "slope_compile/_inductor slope_compile/_inductor_gpu slope_compile/_inductor_lowerings",
    "torch._ops": "passes/_higher_order",
    "torch._subclasses": "slope_compile/_dynamo",
    "torch.fx._lazy_graph_module": "slope_compile/_dynamo",
    "torch.fx.experimental": "passes/_hidden_linears passes/_symbols",
    "torch.utils._python_dispatch": "kernels/_replays",
}
"""Private module of torch -> the files that may use it.  A new torch can break these alone."""

PRIVATE_NAMES = {
    "_functorch": "passes/_higher_order",
    "_schema": "passes/_higher_order kernels/ops slope_compile/_inductor_lowerings",
    "_ExcludeDispatchKeyGuard": "kernels/_autocast",
    **dict.fromkeys(("_cslt_compress", "_cslt_sparse_mm", "_cusparselt"), "kernels/_cusparselt"),
    "_exit": "kernels/cusparselt_trials",
    "_keep_alive": "kernels/gluon_wgmma_sp",
    **dict.fromkeys(("_native_multi_head_attention", "_transformer_encoder_layer_fwd"), "passes/_hidden_linears"),
    **dict.fromkeys(
        ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"), "passes/normalize"
    ),
    **dict.fromkeys(("has_hint", "hint"), "passes/_symbols"),
    "expr": "slope_compile/_symbols",
    "from_tensor": "passes/graph kernels/_gluon",  # a fake mode's, and that of Gluon's tensor descriptors
    "_cdata": "slope_compile/_storage",
    "_parameters": "slope_compile/_module_state",
    "_version": "kernels/_versions",
    "_orig_mod": "slope_compile/_dynamo slope_compile/rules",
    **dict.fromkeys(
        ("_dynamo_source", "_dynamo_static_input_type", "_param_name_to_source", "_backend_id"),
        "slope_compile/_dynamo",
    ),
    **dict.fromkeys(
        ("_call_impl", "_wrapped_call_impl", "_compiled_call_impl", "_call_user_compiler"), "slope_compile/_dynamo"
    ),
    **dict.fromkeys(("_cache", "_cache_enabled", "_inject_new_class"), "slope_compile/_shared_classes"),
    **dict.fromkeys(
        ("_are_functorch_transforms_active", "_current_level", "_dynamo_marked_constant"), "slope_compile/_transforms"
    ),
    "compile_wrapper": "slope_compile/_compiled_call",
    "_getframe": "slope_compile/_compiled_call slope_compile/_dynamo slope_compile/_shared_classes",
}
"""Private attribute of others, by underscore or because it is not documented -> the files that may use it."""


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


def own_names(source: str) -> Iterator[str]:
    """Every name that a file defines: functions, classes, variables, attributes of ``self``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def used_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every attribute, and of every text, since ``getattr`` takes a name as one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in PRIVATE_NAMES:
            yield node.lineno, node.value


def private_uses(path: str, source: str, own: frozenset[str]) -> set[tuple[int, str, bool]]:
    """Line and name of each private thing of others that a file uses, and whether the tables let it.

    An attribute is private if it begins with one underscore and is not among the library's ``own`` names, or if
    :data:`PRIVATE_NAMES` lists it.
    """
    tree, stem = ast.parse(source), path.removesuffix(".py")
    dotted = [
        (found.line, found.module if found.member is None else f"{found.module}.{found.member}")
        for found in imports(tree)
        if not found.level
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := attribute_chain(node.value)) is not None:
            dotted.append((node.lineno, chain))
    modules = {(line, private) for line, text in dotted if (private := private_part(text)) is not None}
    names = {
        (line, name)
        for line, name in used_names(tree)
        if not any(at == line and module.endswith(f".{name}") for at, module in modules)
        if name in PRIVATE_NAMES or (name.startswith("_") and not name.startswith("__") and name not in own)
    }
    return {(line, name, stem in PRIVATE_MODULES.get(name, "").split()) for line, name in modules} | {
        (line, name, stem in PRIVATE_NAMES.get(name, "").split()) for line, name in names
    }


def private_elsewhere(path: str, source: str, own: frozenset[str] = frozenset()) -> list[str]:
    """One message for each private module or name that a file uses and the tables do not allow it.

    Private names move between releases; kept in one file a concern, a new torch breaks that file alone.
    """
    return [
        f"{path}:{line}: {name} is private to others; only these files may use it: "
        f"{PRIVATE_MODULES.get(name) or PRIVATE_NAMES.get(name) or 'none'} (PRIVATE_MODULES, PRIVATE_NAMES)"
        for line, name, allowed in sorted(private_uses(path, source, own))
        if not allowed
    ]


OWN = frozenset(name for path in LIBRARY.values() for name in own_names(path.read_text(encoding="utf-8")))


@library_files
def test_private_names_stay_in_their_files(name: str) -> None:
    fail_if_any(private_elsewhere(name, LIBRARY[name].read_text(encoding="utf-8"), OWN))


def test_the_tables_of_private_names_are_up_to_date() -> None:
    used = {
        (private, name.removesuffix(".py"))
        for name, path in LIBRARY.items()
        for _, private, _ in private_uses(name, path.read_text(encoding="utf-8"), OWN)
    }
    tables = [*PRIVATE_MODULES.items(), *PRIVATE_NAMES.items()]
    assert {(private, file) for private, files in tables for file in files.split()} == used
    homes = {Path(file).name for files in PRIVATE_MODULES.values() for file in files.split()}
    assert all(home.startswith("_") for home in homes), "a private module is used in a file that does not say so"


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
    for path in ("passes/fuse.py", "passes/_torch.py", "slope_compile/__init__.py"):
        assert named in "\n".join(private_elsewhere(path, source))
    for file in PRIVATE_MODULES.get(named, "").split():
        assert private_elsewhere(f"{file}.py", source) == []


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("x.untyped_storage()._cdata", "_cdata"),
        ("model._orig_mod", "_orig_mod"),
        ("getattr(model, '_orig_mod')", "_orig_mod"),
        ("f(weight)._version", "_version"),
        ("mode.from_tensor(x)", "from_tensor"),
        ("size.node.hint", "hint"),
        ("size.node.expr", "expr"),
        ("frame.f_code.co_name == 'compile_wrapper'", "compile_wrapper"),
        ("import torch\ntorch._some_new_operator(x)", "_some_new_operator"),
        ("self._buffers", "_buffers"),
    ],
)
def test_a_private_attribute_is_found(source: str, named: str) -> None:
    for path in ("passes/fuse.py", "passes/_torch.py"):
        (message,) = private_elsewhere(path, source)
        assert f" {named} is private" in message
    for file in PRIVATE_NAMES.get(named, "").split():
        assert private_elsewhere(f"{file}.py", source) == []


def test_public_torch_names_are_fine() -> None:
    source = """
import torch
from torch.fx.passes.infra.pass_base import PassBase
from slope_compile._dynamo import reset
torch._check(x, torch.__version__)
torch.ops.aten._to_copy.default
"""
    assert private_elsewhere("passes/fuse.py", source, frozenset({"_check", "_to_copy", "_dynamo"})) == []


def test_our_own_private_names_are_known() -> None:
    source = "_count = 1\ndef _helper(): ...\nclass _Mark:\n    def f(self):\n        self._field = other.foreign = 1"
    own = frozenset(own_names(source))
    assert own == {"_count", "_helper", "_Mark", "f", "_field"}
    assert private_elsewhere("passes/fuse.py", "a._count, a._helper, a._Mark, a._field", own) == []
