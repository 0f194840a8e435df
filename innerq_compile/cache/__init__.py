"""The cache a model is given: its layers and their life, padding, a file on disk, copies beside a StaticCache.

``InnerQCache`` is imported when it is first used: the backend needs other files of this folder, and no transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from innerq_compile.cache.innerq_cache import InnerQCache

__all__ = ["InnerQCache"]


def __getattr__(name: str) -> object:
    """Import the class from the file that owns it."""
    if name != "InnerQCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from innerq_compile.cache.innerq_cache import InnerQCache

    return InnerQCache
