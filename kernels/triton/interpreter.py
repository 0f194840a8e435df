"""Repairs to Triton's interpreter, for tests and dry runs without a GPU (TRITON_INTERPRET=1); Triton 3.6 to 3.9."""

from __future__ import annotations

import functools

import torch
from triton.runtime import interpreter


@functools.cache
def repair() -> None:
    """Makes the interpreter round float32 to bfloat16 right: it ignores ties and loses carries into the exponent."""
    convert = interpreter._convert_float

    def convert_float(data, input_dtype, output_dtype, rounding_mode):
        if (input_dtype.name, output_dtype.name) == ("fp32", "bf16"):
            return torch.from_numpy(data).bfloat16().view(torch.int16).numpy().view("uint16")
        return convert(data, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = convert_float
