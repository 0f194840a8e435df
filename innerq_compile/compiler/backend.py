"""The ``"innerq"`` backend of ``torch.compile``: options, passes, Inductor."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from innerq_compile.cache.live_caches import keeps_in_16_bits
from innerq_compile.cache.overflow import checked
from innerq_compile.cache.shadow import watched
from innerq_compile.compat import pytorch
from innerq_compile.numerics.config import PRESETS, InnerQConfig
from innerq_compile.passes.decode import run_passes
from innerq_compile.passes.decode.appends import find_appends
from innerq_compile.passes.decode.capture_static_cache import capture_static_cache
from innerq_compile.passes.decode.dynamic_cache import find_dynamic_caches
from innerq_compile.passes.key_norm.fold_captured import fold_captured

logger = logging.getLogger(__name__)

OWN_OPTIONS: dict[str, Any] = {
    "fuse": True,
    "exact": False,
    "key_norm": "runtime",
    "static_cache": "base",
    "fold_id": 0,
}
"""Options that are ours, with their defaults. ``fuse`` rewrites the graph; ``exact`` forbids kernels to round queries
and probabilities (on a CPU to integers, on a GPU to float16); ``key_norm="folded"`` folds the key norm into the model's
weights, in place, with the first prompt that is compiled; ``static_cache`` is the preset of the packed copies beside a
``StaticCache``; ``"off"`` leaves it alone; ``fold_id`` is a number that keeps graphs apart whose weights are folded
separately (``enable`` sets it). Every other key belongs to ``torch._inductor.config``."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "fuse": (True, False),
    "exact": (True, False),
    "key_norm": ("runtime", "folded"),
    "static_cache": (*PRESETS, "off"),
}


def innerq(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles one graph: rewrites its decode attention to read packed codes, then hands it to Inductor.

    ``torch.compile(..., backend="innerq", mode=..., options=...)`` calls this; nobody else needs to.

    Args:
        gm: The graph as Dynamo captured it.
        example_inputs: Its inputs.
        mode: One of Inductor's modes, ``"reduce-overhead"`` for instance.
        options: Keys of :data:`OWN_OPTIONS` and of ``torch._inductor.config``.

    Raises:
        ValueError: An option that neither side knows, or a value that an own option does not have.
    """
    own, inductor = split_options(options or {})
    patches = {**mode_options(mode), **inductor}
    if own["key_norm"] == "folded":
        fold_captured(gm, example_inputs)
    appends = find_appends(gm.graph)
    buffers = _rewrite(gm, example_inputs, own) if own["fuse"] else []
    if _needs_cpp_compiler(example_inputs) and not cpp_compiler_works():
        _tell_once_that_nothing_is_compiled()
        compiled: Callable[..., Any] = gm.forward
    else:
        register_kernels()
        from innerq_compile.kernels.triton.analysis import analyses_remembered

        with analyses_remembered():
            compiled = pytorch.compile_with_inductor(gm, example_inputs, patches)
    if appends:
        compiled = checked(compiled, appends)
    return watched(compiled, buffers) if buffers else compiled


def _rewrite(gm: fx.GraphModule, example_inputs: Sequence[Any], own: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Runs the passes and tells what became of the graph.

    Returns:
        The inputs that packed copies of a ``StaticCache`` belong to, see :func:`innerq_compile.cache.shadow.watched`.
    """
    report = run_passes(gm, exact=own["exact"])
    buffers: list[tuple[int, int]] = []
    # A graph with sites of our own cache holds no other one: its 16-bit layers are what that cache decided.
    if own["static_cache"] != "off" and not report.sites:
        settings = InnerQConfig.from_preset(own["static_cache"])
        kept = _kept_buffers(gm.graph, example_inputs)
        captured, buffers = capture_static_cache(gm.graph, settings, exact=own["exact"], kept=kept)
        report += captured
        gm.recompile()
    report += find_dynamic_caches(gm.graph)
    logger.info("%s", report)
    if report.note:
        _tell_once(report.note)
    return buffers


def _kept_buffers(graph: fx.Graph, example_inputs: Sequence[Any]) -> dict[fx.Node, str]:
    """Inputs that hold a layer which an ``InnerQCache`` does not quantize: what it refused, nobody else may do."""
    placeholders = graph.find_nodes(op="placeholder")
    return {
        node: "as its InnerQCache decided; cache.unquantized says why"
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, torch.Tensor) and keeps_in_16_bits(value)
    }


def mode_options(mode: str | None) -> dict[str, Any]:
    """The options of Inductor that a mode stands for.

    Raises:
        ValueError: An unknown mode.
    """
    modes = pytorch.inductor_modes()
    if mode is not None and mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    return dict(modes[mode]) if mode else {}


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Own options, defaults filled in, and Inductor's.

    Raises:
        ValueError: An unknown key, or a value that an own option does not have.
    """
    own, inductor = dict(OWN_OPTIONS), {}
    for key, value in options.items():
        if key in OWN_OPTIONS:
            choices = CHOICES.get(key, (value,))
            if type(value) is not type(OWN_OPTIONS[key]) or value not in choices:
                expected = " or ".join(map(str, CHOICES.get(key, (type(OWN_OPTIONS[key]).__name__,))))
                raise ValueError(f"option {key!r} must be {expected}, got {value!r}")
            own[key] = value
        else:
            inductor[key.replace("-", "_")] = value
    unknown = sorted(set(inductor) - pytorch.inductor_options()) if inductor else []
    if unknown:
        raise ValueError(
            f"unknown options {unknown} for backend 'innerq'; its own are {sorted(CHOICES)}, all others must be "
            "keys of torch._inductor.config"
        )
    return own, inductor


def register_kernels() -> None:
    """Has Inductor see the Triton kernels in place of the ops. What runs as an op finds its kernels by itself."""
    from innerq_compile.kernels import triton

    triton.register_decompositions()


def _needs_cpp_compiler(example_inputs: Sequence[Any]) -> bool:
    """Whether Inductor will generate C++ for this graph."""
    devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
    return devices <= {"cpu"} and pytorch.inductor_writes_cpp()


@functools.cache
def cpp_compiler_works() -> bool:
    """Whether Inductor's C++ compiler builds a Python extension here, tried once per process on a one-line program."""
    compiler = pytorch.cpp_compiler()
    if compiler is None:
        return False
    if sys.platform == "win32":
        return True
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-shared", "-fPIC", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
        command = [compiler, *flags, f"-I{sysconfig.get_path('include')}", "-x", "c++", "-"]
        program = b"#include <Python.h>\n#include <cmath>\nvoid* probe() { return PyList_New(0); }\n"
        try:
            done = subprocess.run(
                [*command, "-o", os.path.join(folder, "probe.so")], input=program, capture_output=True, timeout=120
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0


@functools.cache
def _tell_once(text: str) -> None:
    logger.warning(text)


def _tell_once_that_nothing_is_compiled() -> None:
    _tell_once(
        "innerq_compile found no working C++ compiler (with the Python headers): graphs run uncompiled, right but "
        "slow. Install one, or point the environment variable CXX at it."
    )
