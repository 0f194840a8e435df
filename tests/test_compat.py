"""Names of other libraries that are not public stand in innerq_compile/compat, and each is there in this version."""

import ast
from pathlib import Path

import pytest

from innerq_compile import compat
from innerq_compile.compat import hf_transformers, pytorch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("innerq_compile", "passes", "kernels")
HOMES = ("innerq_compile/compat/", "kernels/triton/interpreter.py", "kernels/triton/analysis.py")
PUBLIC = {"_fields", "_asdict", "_replace", "_Pointer"}
"""Documented: of named tuples, where the underscore only keeps them apart from fields, and ctypes' type of pointers."""


def is_of_itself(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}


def private_names(source: str) -> list[str]:
    """What a module imports or reads that begins with an underscore and is not its own."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_of_itself(node):
            own.add(node.attr)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("innerq_compile", "__")):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            found += [f"{node.module}.{name}" for name in names if name.startswith("_")]
        elif isinstance(node, ast.Attribute) and not is_of_itself(node) and node.attr not in own | PUBLIC:
            found += [ast.unparse(node)] if node.attr.startswith("_") and not node.attr.startswith("__") else []
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from torch._inductor.exc import X", ["torch._inductor.exc._inductor"]),
        ("import torch\ntorch._dynamo.reset()", ["torch._dynamo"]),
        ("model._orig_mod", ["model._orig_mod"]),
        ("class A:\n    def _f(self): ...\nA()._f()", []),
        ("class A:\n    def __init__(self): self._x = 1\n    def f(self, other): return self._x + other._x", []),
        ("state._replace(x=1).__class__", []),
    ],
)
def test_private_names_are_seen(source, expected):
    assert private_names(source) == expected


def test_no_other_file_uses_private_names():
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            names = [] if name.startswith(HOMES) else private_names(path.read_text(encoding="utf-8"))
            if names:
                found[name] = names
    assert not found


@pytest.mark.parametrize("library", [pytorch, hf_transformers])
def test_everything_named_is_there(library):
    library.check()


def test_missing_name_is_one_line_with_library_version_and_what_was_tested():
    with pytest.raises(ImportError) as caught:
        compat.private("torch", "9.9", "2.11 to 2.13", "torch._inductor.config:no_such_option")
    assert str(caught.value) == (
        "this version of torch (9.9) has no torch._inductor.config.no_such_option, which innerq_compile needs; "
        "tested: 2.11 to 2.13"
    )
