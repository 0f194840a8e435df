"""Compiles, beside the checks, what the tables would otherwise wait for: results stay in the compilers' own caches."""

from __future__ import annotations

import importlib

from gpu_suite.context import Context

FUNCTIONS = {
    "decode": ("decode", "warm"), "flex": ("decode", "warm_flex"), "products": ("products", "warm"),
    "append": ("append", "warm"),
}  # fmt: skip
"""First word of a part of :data:`gpu_suite.plan.COMPILED` -> module and function, which reads the second itself."""


def run(context: Context) -> None:
    """Does one part; on the CPU there is nothing to compile."""
    module, function = FUNCTIONS[context.part.split()[0]]
    if not context.dry:
        getattr(importlib.import_module(f"gpu_suite.{module}"), function)(context)
