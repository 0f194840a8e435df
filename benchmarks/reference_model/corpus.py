"""The training text: what every Python installation carries, split by file.

Sources, docstrings and the language reference that `pydoc` prints. A file belongs to one
side of the split by the hash of its name, so the split does not depend on file order.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from random import Random

SPLIT_SEED = "innerq-reference-1"
HELDOUT_PERCENT = 5
# Tests, generated tables and installed packages are not prose and not the library's own code.
SKIPPED_PARTS = frozenset(
    {"site-packages", "test", "tests", "encodings", "lib2to3", "idlelib", "pydoc_data", "turtledemo"}
)


@dataclass(frozen=True)
class Corpus:
    """Texts of both sides of the split."""

    train: list[str]
    heldout: list[str]


def is_heldout(name: str) -> bool:
    """Which side of the split a file is on, from its name relative to the library."""
    digest = hashlib.sha256(f"{SPLIT_SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT


def load_corpus() -> Corpus:
    """Read the running interpreter's standard library."""
    corpus = Corpus([], [])
    for name, text in sorted(_library_texts() | _topic_texts()):
        # The tasks are written in ASCII; other scripts would only spend vocabulary.
        if text.isascii() and len(text) > 200:
            (corpus.heldout if is_heldout(name) else corpus.train).append(text)
    return corpus


def _library_texts() -> set[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    texts = set()
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_PARTS.intersection(relative.parts) or path.stat().st_size > 300_000:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            prose = _docstrings(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files hold bad source on purpose
        texts.add((relative.as_posix(), source))
        texts.add((relative.as_posix(), prose))
    return texts


def _docstrings(source: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(doc for node in nodes if (doc := ast.get_docstring(node)))


def _topic_texts() -> set[tuple[str, str]]:
    from pydoc_data.topics import topics

    return {(f"pydoc_data/topics/{name}", text) for name, text in topics.items()}


def heldout_excerpt(corpus: Corpus, max_bytes: int = 260_000, max_file: int = 12_000) -> str:
    """Beginnings of the held-out files in a seeded order, up to `max_bytes`."""
    texts = list(corpus.heldout)
    Random(SPLIT_SEED).shuffle(texts)
    parts: list[str] = []
    size = 0
    for text in texts:
        part = text[:max_file].rstrip() + "\n\n"
        if size + len(part) <= max_bytes:
            parts.append(part)
            size += len(part)
    return "".join(parts)
