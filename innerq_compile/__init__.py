"""Transformer decoding on a 3-bit KV cache: a `torch.compile` backend, its passes and kernels, a Hugging Face cache.

The public names are imported when they are first used, so `import innerq_compile` itself loads neither transformers
nor Triton.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from innerq_compile.cache.innerq_cache import InnerQCache
    from innerq_compile.compiler.enable import disable, enable
    from innerq_compile.compiler.explain import explain
    from innerq_compile.key_norm.fold import fold_key_norm
    from innerq_compile.numerics.config import InnerQConfig

__version__ = "0.1.0"
__all__ = ["InnerQCache", "InnerQConfig", "disable", "enable", "explain", "fold_key_norm"]

_OWNER = {
    "InnerQCache": "cache",
    "InnerQConfig": "numerics.config",
    "disable": "compiler.enable",
    "enable": "compiler.enable",
    "explain": "compiler.explain",
    "fold_key_norm": "key_norm.fold",
}

# In a checkout passes/ and kernels/ lie beside this package instead of inside it. An installed wheel needs nothing.
_package = Path(__file__).resolve().parent
_root = _package.parent
if not (_package / "kernels").is_dir() and (_root / "kernels").is_dir() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> object:
    """Import a public name from the module that owns it."""
    if name not in _OWNER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_OWNER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
