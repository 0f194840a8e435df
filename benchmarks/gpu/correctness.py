"""The project's own tests of the kernels, on this device: a pytest per unit, so a crash costs the rest of its files."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import subprocess
import sys
import tempfile

from gpu.section import ROOT, Section

RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")


def run(section: Section) -> None:
    """One row ``tests`` per unit: counts, names of what failed, the end of the output, also when the time is over.

    Raises:
        AssertionError: A test failed, or none was run.
    """
    names = ["test_gpu.py", "test_triton_tiles.py"] if section.dry else section.part.split()
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--no-header"]
    command += [f"tests/{name}" for name in names]
    command += (
        ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") and not section.dry else []
    )
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    status: int | str
    with tempfile.TemporaryFile() as file:
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                  timeout=max(1.0, min(section.seconds_left(), 600.0)))  # fmt: skip
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        file.seek(0)
        output = file.read().decode(errors="replace")
    lines = output.partition("short test summary info")[0].splitlines()
    found = [(word[1].lower(), line.strip()) for line in lines if "::" in line and (word := RESULT.search(line))]
    counts = dict(collections.Counter(word for word, _ in found))
    wrong = [line for word, line in found if word in ("failed", "error")]
    bad = status not in (0, 5, "out of time") or bool(wrong)
    tail = {"output": output[-5000:]} if bad else {}
    section.emit("tests", files=names, status=status, counts=counts, wrong=wrong, **tail)
    if bad:
        raise AssertionError(output[-4000:])
