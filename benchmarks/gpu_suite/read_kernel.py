"""The Triton kernel that only reads."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["steps"])
def read_kernel(x_ptr, out_ptr, count, steps, BLOCK: tl.constexpr):
    """out[p] = sum of the int32 numbers of x [count] that program p reads, int32 with wrap-around.

    Grid: (programs,). Programs take turns by blocks, so that together they walk through memory once.
    """
    program = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for _ in tl.range(0, steps, num_stages=4):
        total += tl.load(x_ptr + offsets, mask=offsets < count, other=0)
        offsets += stride
    tl.store(out_ptr + program, tl.sum(total, 0))
