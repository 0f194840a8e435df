"""The cache a model is given: its layers and their life, padding, a file on disk, copies beside a StaticCache."""

from innerq_compile.cache.innerq_cache import InnerQCache

__all__ = ["InnerQCache"]
