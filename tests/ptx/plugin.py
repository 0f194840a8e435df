"""Makes the kernels' own tests run on compiled code: ``INNERQ_EMULATE=90 pytest tests/test_triton_kernels.py``."""

from __future__ import annotations

import torch

from innerq_compile.kernels.triton import decode_attention
from ptx.launch import Emulator


def install(settings: str) -> Emulator:
    """Emulates every launch of this process, and has the launchers choose what they choose on such a GPU.

    Args:
        settings: Compute capability, 80 or 90, then what to do otherwise, all separated by commas: ``races`` runs one
            program at a time and watches for missing barriers; ``fused`` lets the compiler fuse products and sums in
            all kernels, as Inductor does, whatever the launcher says.
    """
    capability, *modes = settings.split(",")
    decode_attention._has_ptx = lambda device: True
    decode_attention._has_native_dot = lambda query: query.dtype != torch.float32
    watching = {"races": True, "late_copies": False, "ctas": 1} if "races" in modes else {}
    emulator = Emulator(int(capability), options={"enable_fp_fusion": True} if "fused" in modes else {}, **watching)
    emulator.install()
    return emulator
