"""Packing and unpacking of tiles on the device against the definition in quant.py."""

import pytest
import torch

from innerq_compile.numerics.config import BITS
from innerq_compile.numerics.quant import pack_tiles

tl = pytest.importorskip("triton.language")
import triton  # noqa: E402

from innerq_compile.kernels.triton import tiles  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def repack_kernel(
    in_ptr, out_ptr, codes_ptr, BITS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, SPLIT_C: tl.constexpr
):
    """Unpacks P x T tiles that lie one after the other, and packs them again in transposed order."""
    fours = tiles.load_fours(in_ptr, T * 128 * BITS, 128 * BITS, BITS, P, T, SPLIT_C)
    codes = tiles.load_codes(in_ptr, T * 128 * BITS, 128 * BITS, BITS, P, T)
    outer, inner = tl.arange(0, 32 * P)[:, None], tl.arange(0, 32 * T)[None, :]
    tl.store(codes_ptr + outer * (32 * T) + inner, codes)
    tiles.store_fours(out_ptr, 128 * BITS, P * 128 * BITS, fours, BITS, P, T, SPLIT_C)


@pytest.mark.parametrize(("P", "T"), [(1, 1), (1, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("split_c", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_tiles_are_those_of_the_definition(bits: int, split_c: bool, P: int, T: int) -> None:
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (P, T, 32, 32), dtype=torch.uint8, device=DEVICE)
    packed = pack_tiles(codes, bits)
    out = torch.zeros_like(packed)
    unpacked = torch.zeros(32 * P, 32 * T, dtype=torch.int32, device=DEVICE)
    repack_kernel[(1,)](packed, out, unpacked, BITS=bits, P=P, T=T, SPLIT_C=split_c)
    assert torch.equal(unpacked, codes.transpose(1, 2).reshape(32 * P, 32 * T).int())
    assert torch.equal(out.reshape(T, P, -1), packed.transpose(0, 1))
