"""What a result file says about the machine and the software it was made with."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path

from innerq_compile.cli import environment

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """The CPU's marketing name, or its architecture."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return match.group(1) if match else platform.processor() or platform.machine()


def slug() -> str:
    """The CPU's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", cpu_name().lower().replace("(r)", "")).strip("-")


def machine() -> dict[str, str]:
    """CPU, versions, commit ("-dirty" behind it where files were changed) and date."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    facts = environment() | {"cpu name": cpu_name(), "commit": commit, "date": datetime.date.today().isoformat()}
    return {name: fact for name, fact in facts.items() if fact != "absent"}
