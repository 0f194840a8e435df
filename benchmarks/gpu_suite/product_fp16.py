"""The two products over float16 keys and values: what the quantized ones are compared with, beside torch.matmul."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["steps"])
def qk_fp16_kernel(q_ptr, k_ptr, out_ptr, tokens, steps, D: tl.constexpr, BLOCK: tl.constexpr):
    """out[h, t] = q[h] . k[h, t]: q float16 [heads, D], k float16 [heads, tokens, D], out float32 [heads, tokens].

    Grid: (tokens / (BLOCK * steps), heads); the division leaves no rest.
    """
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + head * D + d).to(tl.float32)
    for step in tl.range(0, steps):
        token = (tl.program_id(0) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        k = tl.load(k_ptr + (head * tokens + token[:, None]) * D + d)
        tl.store(out_ptr + head * tokens + token, tl.sum(k.to(tl.float32) * q, 1))


@triton.jit(do_not_specialize=["steps"])
def av_fp16_kernel(p_ptr, v_ptr, out_ptr, tokens, steps, D: tl.constexpr, BLOCK: tl.constexpr):
    """out[h, split] = p[h, tokens of the split] . v[h, same tokens]: float16 in, float32 [heads, splits, D] out.

    Grid: (tokens / (BLOCK * steps), heads); the division leaves no rest.
    """
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    total = tl.zeros([BLOCK, D], tl.float32)
    for step in tl.range(0, steps):
        token = (tl.program_id(0) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(v_ptr + (head * tokens + token[:, None]) * D + d[None, :])
        total += tl.load(p_ptr + head * tokens + token).to(tl.float32)[:, None] * v.to(tl.float32)
    tl.store(out_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * D + d, tl.sum(total, 0))
