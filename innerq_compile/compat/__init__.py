"""Names of other libraries that are not public, one file a library, so that a new version breaks in one place.

Beside these stand two files that replace functions of a library for a while, each where its subject is:
``kernels/triton/interpreter.py`` (bfloat16 in Triton's interpreter) and ``kernels/triton/analysis.py`` (an analysis of
torch's, remembered).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def private(library: str, version: str, tested: str, path: str) -> Any:
    """The object at a dotted ``path`` of a library.

    Raises:
        ImportError: It is not there; one line says which, in which version, and which versions are known to have it.
    """
    module, names = path.split(":")
    try:
        found: Any = import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"this version of {library} ({version}) has no {path.replace(':', '.')}, which innerq_compile needs; "
            f"tested: {tested}"
        ) from error
    return found
