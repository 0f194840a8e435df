"""What torch finds out about our kernels on their way into Inductor, found out once per kernel and not in every layer.

Which buffers a kernel writes, torch reads off the kernel's Triton code. It translates that code anew each time: a
fifth of a second for decode attention, four times a launch, and the answer never changes. That was more than half of
the time that compiling a model took (benchmarks/LOG.md).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

Analysis: TypeAlias = Callable[[Any, dict[str, Any], dict[str, Any]], Any]
"""``analysis(kernel, arguments, descriptors)``, both by argument name. What it returns names arguments, too."""

NAMES = ("identify_accessed_tensors", "identify_mutated_tensors")
"""What torch calls it: today, and in 2.11."""


@contextlib.contextmanager
def analyses_remembered() -> Iterator[None]:
    """While this lasts, torch analyses a kernel once for all launches that differ in their tensors alone.

    It replaces a function of torch that is not public. A torch that has none of :data:`NAMES` analyses as it likes.
    Compilations in several threads may overlap: they share what is found out, and the last to end gives torch its own
    back.
    """
    global _num_users
    from torch._higher_order_ops import triton_kernel_wrap

    with _lock:
        if _num_users == 0:
            _own.update((n, getattr(triton_kernel_wrap, n)) for n in NAMES if hasattr(triton_kernel_wrap, n))
            for name, analysis in _own.items():
                setattr(triton_kernel_wrap, name, remembered(analysis))
        _num_users += 1
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if _num_users == 0:
                for name, analysis in _own.items():
                    setattr(triton_kernel_wrap, name, analysis)
                _own.clear()


_lock = threading.Lock()
_num_users = 0
_own: dict[str, Analysis] = {}
"""torch's own analyses, while ours stand in their places."""


def remembered(analysis: Analysis) -> Analysis:
    """The analysis, made once for each kernel and all that it can see of the arguments."""
    results: dict[Any, Any] = {}

    def analyse(kernel: Any, arguments: dict[str, Any], descriptors: dict[str, Any]) -> Any:
        if descriptors:  # of the tensor memory accelerator; none of our kernels takes any
            return analysis(kernel, arguments, descriptors)
        function, seen = kernel, arguments
        for choice in getattr(kernel, "configs", ())[:1]:
            # A launch that sets num_warps comes as a tuner of its own around the kernel; its first choice is analysed.
            function, seen = kernel.fn, {**arguments, **choice.kwargs}
        key = (function, tuple((name, _kind(argument)) for name, argument in seen.items()))
        if key not in results:
            results[key] = analysis(kernel, arguments, descriptors)
        return results[key]

    return analyse


def _kind(argument: Any) -> tuple[Any, ...]:
    """A tensor's dtype; type and value of a number, type and name of a symbol."""
    dtype = getattr(argument, "dtype", None)
    return (dtype,) if isinstance(dtype, torch.dtype) else (type(argument), str(argument))
