"""What the wheel holds, and what importing the package promises, each seen from a fresh process."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_INPUTS = [
    "innerq_compile",
    "passes",
    "kernels",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
]
# Suffixes that are shipped from each folder of the repository; None ships everything.
SHIPPED = {
    "innerq_compile": {".py", ".typed"},
    "passes": {".py"},
    "kernels": {".py", ".cpp", ".h"},
    "innerq_compile/demo/model": None,
}


def run_python(code: str, cwd: Path, pythonpath: Path | None = None) -> str:
    """Run code in a fresh interpreter whose sys.path starts with cwd, as `python -c` does, and return its output."""
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    if pythonpath:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from an sdist of a copy of the tree, so that no stale build/ takes part, and unpack it."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    output = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(output)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [sdist] = output.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", output, sdist], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = output.glob("*.whl")
    unpacked = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(unpacked)
    return unpacked


def shipped_files() -> set[str]:
    """List the files of the tree that belong in the wheel, by their installed names."""
    expected = set()
    for folder, suffixes in SHIPPED.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and (suffixes is None or path.suffix in suffixes):
                name = path.relative_to(ROOT).as_posix()
                expected.add(name if name.startswith("innerq_compile/") else f"innerq_compile/{name}")
    return expected


def test_wheel_top_level_is_the_package_and_its_metadata(unpacked_wheel: Path) -> None:
    names = {path.name for path in unpacked_wheel.iterdir()}
    assert names == {"innerq_compile", "innerq_compile-0.1.0.dist-info"}


def test_wheel_holds_exactly_the_shipped_files(unpacked_wheel: Path) -> None:
    package = unpacked_wheel / "innerq_compile"
    held = {path.relative_to(unpacked_wheel).as_posix() for path in package.rglob("*") if path.is_file()}
    assert held == shipped_files()


def test_wheel_imports_away_from_the_repository(unpacked_wheel: Path, tmp_path: Path) -> None:
    modules = ["innerq_compile", "innerq_compile.passes", "innerq_compile.kernels.cpu"]
    code = f"import {', '.join(modules)}; print(innerq_compile.kernels.cpu.__file__)"
    assert Path(run_python(code, tmp_path, unpacked_wheel)).is_relative_to(unpacked_wheel)


def test_checkout_imports_from_the_repository_root() -> None:
    code = "import innerq_compile.passes, innerq_compile.kernels.cpu as cpu; print(cpu.__file__)"
    assert Path(run_python(code, ROOT)).resolve().is_relative_to(ROOT / "kernels")


def test_transformers_imports_from_the_repository_root() -> None:
    run_python("import transformers; from transformers import AutoModelForCausalLM", ROOT)


def test_backend_is_listed(tmp_path: Path) -> None:
    code = "import torch._dynamo; print(*torch._dynamo.list_backends())"
    assert "innerq" in run_python(code, tmp_path).split()


def test_import_loads_neither_transformers_nor_triton(tmp_path: Path) -> None:
    code = "import sys, innerq_compile; print({'transformers', 'triton', 'torch'} & set(sys.modules))"
    assert run_python(code, tmp_path) == "set()"


def test_version_matches_the_metadata(tmp_path: Path) -> None:
    code = "import innerq_compile; print(innerq_compile.__version__)"
    assert run_python(code, tmp_path) == importlib.metadata.version("innerq-compile")


def test_unknown_attribute_is_an_attribute_error(tmp_path: Path) -> None:
    assert run_python("import innerq_compile; print(hasattr(innerq_compile, 'no_such_name'))", tmp_path) == "False"
