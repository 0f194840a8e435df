"""What the README tells a user to type works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from innerq_compile.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(README)


@pytest.mark.slow
def test_python_blocks_run_one_after_another():
    program = "\n".join(text for language, text in BLOCKS if language == "python")
    assert "innerq_compile.enable(model" in program
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_commands_exist():
    commands = "".join(text for language, text in BLOCKS if language == "")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    typed = set(re.findall(r"^make (\w+)", commands, re.MULTILINE))
    assert typed and typed <= targets
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    typed = set(re.findall(r"^innerq (\w+)", commands, re.MULTILINE))
    assert typed and typed <= known


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and not [link for link in links if not (ROOT / link).exists()]
