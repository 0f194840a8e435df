"""Texts of 8000 tokens and more that are on every machine: nothing is fetched, each is named with its hash."""

from __future__ import annotations

import hashlib
import inspect
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F

from innerq_compile.demo.run import MODEL_DIR


def _api() -> str:
    """Documentation of an API: every docstring of ``torch.nn.functional``."""
    documented = {name: inspect.getdoc(getattr(F, name)) for name in sorted(dir(F)) if not name.startswith("_")}
    return "\n\n".join(f"{name}\n{text}" for name, text in documented.items() if text and len(text) > 200)


def _manual() -> str:
    """Prose with examples: the chapters of Python's language reference that ``help()`` shows."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def _code() -> str:
    """Python code that the reference model was not trained on."""
    return (MODEL_DIR / "heldout.txt").read_text(encoding="utf-8")


TEXTS: dict[str, Callable[[], str]] = {"api": _api, "manual": _manual, "code": _code}
"""Name -> what makes it. The first two depend on the versions of torch and Python: compare hashes before figures."""


def read_text(name: str) -> tuple[str, str]:
    """A text by name, or of a UTF-8 file, and the first 12 digits of its SHA-256.

    Raises:
        ValueError: Neither a name nor a file.
    """
    if name in TEXTS:
        text = TEXTS[name]()
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"text must be one of {', '.join(TEXTS)} or a file, got {name!r}")
    return text, hashlib.sha256(text.encode()).hexdigest()[:12]
