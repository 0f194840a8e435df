"""Repairs to Triton's interpreter, for tests and dry runs without a GPU (TRITON_INTERPRET=1); Triton 3.6 to 3.9."""

from __future__ import annotations

import functools

import torch
from triton.runtime import interpreter


@functools.cache
def repair() -> None:
    """Makes the interpreter round float32 to bfloat16 right: it ignores ties and loses carries into the exponent.

    And has Triton before 3.9 loop up to a number that the device computed, which numpy from 2.4 on refuses.
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
