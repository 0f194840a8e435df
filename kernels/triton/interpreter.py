"""Repairs to Triton's interpreter, for tests and dry runs without a GPU (TRITON_INTERPRET=1); Triton 3.6 to 3.9."""

from __future__ import annotations

import functools

import numpy as np
import torch
from triton.runtime import interpreter


@functools.cache
def repair() -> None:
    """Makes the interpreter round float32 to bfloat16 right: it ignores ties and loses carries into the exponent.

    Before 3.9 it also rounds a fused multiply-add twice, and cannot loop up to a number that the device computed, which
    numpy from 2.4 on refuses.
    """
    convert, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert_float(data, input_dtype, output_dtype, rounding_mode):
        if (input_dtype.name, output_dtype.name) == ("fp32", "bf16"):
            return torch.from_numpy(data).bfloat16().view(torch.int16).numpy().view("uint16")
        return convert(data, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = convert_float

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        interpreter.InterpreterBuilder.create_fma = _create_fma


def _create_fma(self, x, y, z):
    compute = fma_float32 if x.data.dtype == np.float32 else lambda a, b, c: a * b + c
    return interpreter.TensorHandle(compute(x.data, y.data, z.data), z.dtype.scalar)


def fma_float32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z``, rounded once.

    The product is exact in float64. The sum is rounded to odd there (what is cut off sets the last bit), which has
    more than the two spare bits that make the second rounding harmless (Boldo and Melquiond 2008).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = product + addend
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        is_even = (total.view(np.int64) & 1) == 0
        to_odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        return np.where(np.isfinite(total) & (lost != 0) & is_even, to_odd, total).astype(np.float32)
