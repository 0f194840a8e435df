"""The project's own tests: those marked gpu, and those of the kernels, which take the GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_suite.context import Context

ROOT = Path(__file__).resolve().parents[2]
NOTHING_COLLECTED, TIMEOUT = 5, "timeout"
KERNEL_TESTS = "test_triton"
"""Tests of the kernels that carry no marker, because without a GPU they run in Triton's interpreter."""

COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")


def run(context: Context) -> None:
    """One row ``pytest``: exit status, counts, and the end of the output where something failed.

    Raises:
        AssertionError: A test failed.
    """
    marked = context.part == "marked"
    files = [path for path in test_files() if (is_marked(path) if marked else is_of_kernels(path))]
    names = [str(path.relative_to(ROOT)) for path in files][: 1 if context.dry else None]
    if not names:
        context.emit("pytest", part=context.part, status=NOTHING_COLLECTED, counts={}, files=[])
        return
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") and not context.dry else []
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *workers, *names]
    command += ["-m", "gpu" if marked or context.dry else "not gpu"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    status, output = _output(command, environment, max(5.0, context.seconds_left()))
    counts = {name: int(number) for number, name in COUNT.findall(output[-500:])}
    passed = status in (0, NOTHING_COLLECTED, TIMEOUT)
    tail = {} if status in (0, NOTHING_COLLECTED) else {"output": output[-6000:]}
    context.emit("pytest", part=context.part, status=status, counts=counts, files=names, **tail)
    if not passed:
        raise AssertionError(output[-4000:])


def test_files() -> list[Path]:
    """All test files of the project."""
    return sorted((ROOT / "tests").glob("test_*.py"))


def is_marked(path: Path) -> bool:
    """Whether a file mentions the marker: collecting all others would take longer than running these."""
    return "mark.gpu" in path.read_text(encoding="utf-8")


def is_of_kernels(path: Path) -> bool:
    """Whether a file runs kernels; one that only compiles them for other devices takes minutes and needs no GPU."""
    return path.name.startswith(KERNEL_TESTS) and "ahead" not in path.name


def _output(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | str, str]:
    """Exit status, or the word timeout, and what was printed until then.

    Into a file: workers of a pytest that was stopped would keep a pipe open.
    """
    with tempfile.TemporaryFile() as file:
        try:
            status: int | str = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = TIMEOUT
        file.seek(0)
        return status, file.read().decode(errors="replace")
