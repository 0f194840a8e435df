"""The arrows of the design: which module of the package may import which, and how long a file may grow."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "innerq_compile"
MAPPED = ("passes", "kernels")  # folders of the root that are installed inside the package

# One row per part: the parts it may import, beside compat, the private names of other libraries. A part may import
# itself; a folder's name stands for all of it to those outside, and inside for what lies in it directly.
ALLOWED = {
    "__init__": {"cache", "compiler", "key_norm", "numerics"},
    "compat": set(),
    "refused": set(),
    "numerics": set(),
    "numerics.config": set(),
    "numerics.layout": {"numerics.config"},
    "numerics.arguments": {"numerics.config", "numerics.layout"},
    "numerics.quant": {"numerics.config", "numerics.layout"},
    "numerics.reference": {"numerics.config", "numerics.layout", "numerics.quant"},
    "ops": {"numerics"},
    "cache": {"numerics", "ops", "refused"},
    "kernels.cpu": {"numerics.config", "numerics.layout", "numerics.quant", "ops"},
    "kernels.triton": {"numerics.arguments", "numerics.config", "numerics.layout", "numerics.quant", "ops"},
    "passes": {"ops"},
    "passes.decode": {"cache", "numerics", "ops", "passes"},
    "passes.key_norm": {"cache", "numerics", "ops", "passes", "refused"},
    "key_norm": {"cache", "passes"},
    "compiler": {"cache", "kernels", "numerics", "ops", "passes", "refused"},
    "demo": {"cache", "compiler", "numerics"},
    "evaluation": {"cache", "demo", "kernels"},
    "cli": {"cache", "compiler", "demo", "evaluation", "kernels", "__init__"},
}

PACKAGE_FILE_LINES = 400
KERNEL_FILE_LINES = 500


def sources() -> dict[str, Path]:
    """Map each module's installed name, without the package prefix ("" is the package itself), to its file."""
    folders = [(ROOT / PACKAGE, ()), *((ROOT / name, (name,)) for name in MAPPED)]
    found = {}
    for folder, prefix in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


def part_of(module: str) -> str:
    """Name the row of ALLOWED that a module belongs to: the longest prefix that has one, else the module itself."""
    if module == "":
        return "__init__"
    names = module.split(".")
    prefixes = [".".join(names[:count]) for count in range(len(names), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in ALLOWED), module)


def absolute_base(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """Resolve the `from X` of an import statement to a dotted name."""
    if node.level == 0:
        return node.module or ""
    here = [PACKAGE, *filter(None, module.split("."))]
    parent = here[: len(here) - node.level + is_package]
    return ".".join([*parent, *([node.module] if node.module else [])])


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and dotted name of everything imported, at module level, inside functions and by string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(node, module, is_package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imported_part(name: str) -> str | None:
    """Name the part of the package an imported dotted name lies in; None for other packages and the version."""
    if name == f"{PACKAGE}.__version__" or name.split(".")[0] != PACKAGE:
        return None
    inner = name.removeprefix(PACKAGE).removeprefix(".")
    names = inner.split(".")
    known = [".".join(names[:count]) for count in range(len(names), 0, -1)]
    module = next((prefix for prefix in known if prefix in MODULES or prefix in ALLOWED), "")
    return "kernels" if names[0] == "kernels" and module == "" else part_of(module)


def may_import(part: str, target: str) -> bool:
    """Whether a row names a part, or the folder of it from outside that folder."""
    folder = target.split(".")[0]
    return target in ALLOWED[part] or (folder in ALLOWED[part] and folder != part.split(".")[0])


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """List the imports of one module that its row does not allow."""
    part = part_of(module)
    found = []
    for line, name in imported_names(ast.parse(source), module, is_package):
        target = imported_part(name)
        if name.split(".")[0] in MAPPED:
            found.append(f"line {line}: {name} lacks the prefix {PACKAGE}.")
        elif target and target not in {part, "compat"} and not may_import(part, target):
            found.append(f"line {line}: {part} may not import {target} ({name})")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or PACKAGE)
def test_module_imports_only_what_its_row_allows(module: str) -> None:
    if module == "kernels":
        pytest.fail("kernels/ must have no __init__.py")
    part = part_of(module)
    assert part in ALLOWED, f"unknown module {module}: add a row to ALLOWED in {Path(__file__).name}"
    path = MODULES[module]
    found = violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops", "from innerq_compile.kernels import cpu"),
        ("ops", "def load():\n    import innerq_compile.kernels.cpu.launch"),
        ("ops", "import_module('innerq_compile.kernels.cpu')"),
        ("ops", "importlib.import_module('innerq_compile.kernels.cpu')"),
        ("ops", "from innerq_compile import kernels"),
        ("ops", "from . import compiler"),
        ("ops", "from innerq_compile import InnerQCache"),
        ("numerics.config", "from .layout import bytes_per_token"),
        ("cache.layer", "from innerq_compile.passes.report import Report"),
        ("cache.mark", "from innerq_compile.key_norm import fold"),
        ("passes.decode.fuse_decode", "from innerq_compile.kernels.cpu import register"),
        ("passes.decode.fuse_decode", "from ...kernels.cpu import register"),
        ("passes.decode.fuse_decode", "from passes.decode import match"),
        ("passes.decode.match", "from innerq_compile.passes.key_norm.key_sites import base_name"),
        ("passes.graph", "from innerq_compile.passes.decode.match import match"),
        ("kernels.cpu.decode_attention", "from innerq_compile.numerics.reference import decode_attention"),
        ("kernels.cpu.decode_attention", "from ...numerics import reference"),
        ("kernels.cpu.decode_attention", "from innerq_compile.kernels.triton import register"),
        ("compiler.backend", "from innerq_compile import demo"),
        ("demo.train", "from innerq_compile import evaluation"),
    ],
)
def test_forbidden_import_is_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "ops",
            "import torch\nfrom innerq_compile.numerics import reference\nfrom innerq_compile.numerics.layout import A",
        ),
        ("passes.decode.fuse_decode", "from innerq_compile.passes.decode import match\nfrom . import canonicalize"),
        ("kernels.cpu.pack", "from innerq_compile.kernels.cpu import build\nfrom innerq_compile import ops"),
        ("compiler.backend", "import_module('innerq_compile.kernels.cpu')\nfrom innerq_compile import kernels, passes"),
        ("cache.layer", "from innerq_compile.compat import pytorch\nfrom innerq_compile.numerics.config import BLOCK"),
        ("cli", "from innerq_compile import demo, evaluation, __version__"),
    ],
)
def test_allowed_import_passes(module: str, source: str) -> None:
    assert not violations(module, source)


def length_budgets() -> list[tuple[Path, int]]:
    """List every source file of the package with the lines it may have."""
    native = [path for pattern in ("*.cpp", "*.h") for path in sorted((ROOT / "kernels").rglob(pattern))]
    return [
        (path, KERNEL_FILE_LINES if path.is_relative_to(ROOT / "kernels") else PACKAGE_FILE_LINES)
        for path in [*MODULES.values(), *native]
    ]


@pytest.mark.parametrize(("path", "budget"), length_budgets(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_file_stays_within_its_length(path: Path, budget: int) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= budget


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folder_is_no_regular_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
