"""The arrows of the design: which module of the package may import which, and how long a file may grow."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "innerq_compile"
MAPPED = ("passes", "kernels")  # folders of the root that are installed inside the package

# One row per part: the parts it may import. A row may also import itself (its own sub-modules).
ALLOWED = {
    "__init__": {"cache", "config", "explainer", "fold", "generation"},
    "config": set(),
    "calibration": set(),
    "folded": set(),
    "layout": {"config"},
    "arguments": {"config", "layout"},
    "quant": {"config", "layout"},
    "reference": {"config", "layout", "quant"},
    "ops": {"arguments", "config", "layout", "quant", "reference"},
    "padding": set(),
    "refused": set(),
    "rope": {"refused"},
    "overflow": {"layout", "ops"},
    "room": {"config", "ops"},
    "held_tensors": set(),
    "per_layer": set(),
    "facts": {"folded", "per_layer", "room"},
    "sixteen_bit": {"held_tensors", "ops", "room"},
    "layer": {"config", "held_tensors", "layout", "quant", "reference", "ops", "room"},
    "layer_choice": {"config", "layout", "refused", "rope"},
    "live_caches": {"layer"},
    "saved": {"config", "facts", "room", "storage"},
    "cache": {"config", "facts", "folded", "held_tensors", "layer_choice", "layout", "layer", "live_caches"},
    "storage": {"config", "layout", "layer", "sixteen_bit"},
    "self_check": {"layer", "refused"},
    "support": {"per_layer", "refused"},
    "shadow": {"config", "layout", "ops"},
    "report": {"config", "layout", "quant", "reference", "ops"},
    "kernels.cpu": {"config", "layout", "quant", "ops", "report"},
    "kernels.triton": {"arguments", "config", "layout", "quant", "ops", "report"},
    "passes": {"config", "layout", "quant", "reference", "ops", "overflow", "shadow", "cache", "live_caches", "report"},
    "backend": {"config", "layout", "ops", "live_caches", "overflow", "cache", "report", "passes", "kernels", "shadow"},
    "fold": {"calibration", "folded", "live_caches", "passes"},
    "optimum_fx": {"fold", "passes"},
    "explainer": {"config", "cache", "refused", "report", "passes", "self_check", "support"},
    "generation": {"cache", "folded", "live_caches", "passes", "room", "backend", "self_check", "support"},
    "export": {"config", "layout", "quant", "reference", "ops", "cache", "report", "passes", "kernels", "backend"},
    "demo": {"config", "layout", "quant", "reference", "ops", "cache", "report", "passes", "kernels", "backend"},
}
ALLOWED["cache"] |= {"overflow", "padding", "per_layer", "room", "rope", "saved", "sixteen_bit", "storage"}
ALLOWED["evaluation"] = {"cache", "demo", "kernels"}
ALLOWED["demo"] |= {"explainer", "fold", "generation"}
ALLOWED["cli"] = {*ALLOWED["export"], "explainer", "generation", "export", "demo", "evaluation", "__init__"}

ALLOWED["compat"] = set()
for _row in ALLOWED.values():  # names of other libraries may be needed anywhere
    _row.add("compat")

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


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """List the imports of one module that its row does not allow."""
    part = part_of(module)
    found = []
    for line, name in imported_names(ast.parse(source), module, is_package):
        target = imported_part(name)
        if name.split(".")[0] in MAPPED:
            found.append(f"line {line}: {name} lacks the prefix {PACKAGE}.")
        elif target and target != part and not {target, target.split(".")[0]} & ALLOWED[part]:
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
        ("ops", "from . import backend"),
        ("ops", "from innerq_compile import InnerQCache"),
        ("config", "from .layout import bytes_per_token"),
        ("passes.fuse_decode", "from innerq_compile.kernels.cpu import register"),
        ("passes.fuse_decode", "from ..kernels.cpu import register"),
        ("passes.fuse_decode", "from passes import match"),
        ("kernels.cpu.decode_attention", "from innerq_compile.reference import decode_attention"),
        ("kernels.cpu.decode_attention", "from ... import reference"),
        ("kernels.cpu.decode_attention", "from innerq_compile.kernels.triton import register"),
        ("backend", "from innerq_compile import demo"),
        ("demo.train", "from innerq_compile import export"),
    ],
)
def test_forbidden_import_is_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops", "import torch\nfrom innerq_compile import reference\nfrom innerq_compile.layout import CacheLayout"),
        ("passes.fuse_decode", "from innerq_compile.passes import match\nfrom . import canonicalize"),
        ("kernels.cpu.pack", "from innerq_compile.kernels.cpu import build\nfrom innerq_compile import ops"),
        ("backend", "import_module('innerq_compile.kernels.cpu')\nfrom innerq_compile import kernels, passes"),
        ("cli", "from innerq_compile import demo, export, __version__"),
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
