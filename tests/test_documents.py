"""What the documents tell a user to type works, where they lead exists, and what they quote is what the code says."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from innerq_compile.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = ("make", "innerq", "python", "torchrun", "pip")
PACKAGE = ("innerq_compile", "passes", "kernels")

# Compiling is shown by the README's block alone. Elsewhere only explain() needs graphs, as long as it comes before
# everything else; the rest gives the same without them.
UNCOMPILED = """
import torch, innerq_compile
innerq_compile.explain = torch._dynamo.config.patch(disable=False)(innerq_compile.explain)
torch._dynamo.config.disable = True
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(text_of(path)) if found == language]


def prose(path: Path) -> str:
    return FENCE.sub("", text_of(path))


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=name_of)
def test_python_blocks_run_one_after_another(path):
    program = "\n".join(blocks(path, "python"))
    assert "innerq_compile" in program
    if path.name != "README.md":
        program = UNCOMPILED + program
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def commands(path: Path) -> list[list[str]]:
    """Every command line of a document, from blocks without a language and from the running text, as words."""
    lines = [line for block in blocks(path, "") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(path))
    found = []
    for line in lines:
        line = line.partition(" #")[0].strip()
        if line.split(" ")[0] in PROGRAMS and " " in line:
            found.append(shlex.split(line))
    return found


def wrong_with(command: list[str]) -> str | None:
    """Why a command cannot be typed, or ``None``."""
    program, *arguments = command
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
        return None if arguments[0] in targets else f"no target {arguments[0]}"
    if program == "innerq":
        known = typer.main.get_command(app).commands
        if arguments[0] not in known:
            return f"no command {arguments[0]}"
        options = {name for parameter in known[arguments[0]].params for name in parameter.opts}
        unknown = [word for word in arguments[1:] if word.startswith("--") and word not in options]
        return f"no options {unknown}" if unknown else None
    files = [word for word in arguments if word.endswith(".py")]
    missing = [word for word in files if not (ROOT / word).exists() and "/" in word]
    return f"no files {missing}" if missing else None


@every_document
def test_commands_exist(path):
    problems = {" ".join(command): wrong_with(command) for command in commands(path)}
    assert not {command: why for command, why in problems.items() if why}


def test_the_readme_names_the_first_commands():
    typed = {" ".join(command[:2]) for command in commands(ROOT / "README.md")}
    assert {"make demo", "innerq explain"} <= typed


def anchors(path: Path) -> set[str]:
    """The names by which GitHub links to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@every_document
def test_files_that_are_named_exist(path):
    named = re.findall(r"`((?:innerq_compile|passes|kernels|tests|benchmarks|examples|docs)/[\w./-]*)`", prose(path))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_section_that_the_code_cites_exists():
    sections = set(re.findall(r"^## (\d+)\.", text_of(ROOT / "docs" / "design.md"), re.MULTILINE))
    sources = [path for folder in (*PACKAGE, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    cited = [number for path in sources for number in re.findall(r"docs/design\.md section (\d+)", text_of(path))]
    assert cited and set(cited) <= sections


def pieces(node: ast.expr) -> list[str]:
    """The constant parts of a message, in order."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    return []


def warnings_of(path: Path) -> list[list[str]]:
    """The constant parts of every warning that a file utters, or keeps in a constant called ADVICE."""
    found = []
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in {"warning", "warn"} or name.startswith("_tell_once"):
                found += [pieces(argument) for argument in node.args[:1]]
        elif isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "ADVICE" for target in node.targets):
            found.append(pieces(node.value))
    split = [[part for text in parts for part in text.split("%s")] for parts in found]
    return [[part for part in parts if part.strip(" .:")] for parts in split if parts]


SPEAKING = [path for folder in PACKAGE for path in sorted((ROOT / folder).rglob("*.py")) if warnings_of(path)]


@pytest.mark.parametrize("path", SPEAKING, ids=name_of)
def test_every_warning_is_explained(path):
    explained = " ".join(text_of(ROOT / "docs" / "troubleshooting.md").split())
    parts = [part.strip() for message in warnings_of(path) for part in message]
    missing = [part for part in parts if " ".join(part.split()) not in explained]
    assert not missing, "docs/troubleshooting.md does not quote this"


def test_the_readme_stays_short():
    kept = re.sub(r"^<!-- support matrix.*?^<!-- end[^\n]*\n", "", text_of(ROOT / "README.md"), flags=re.M | re.S)
    assert len(kept.splitlines()) <= 110
