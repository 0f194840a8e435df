"""torch's scaled_dot_product_attention over a 16- or 32-bit cache, as transformers calls it and as well as it can go.

"repeat_kv" is what a DynamicCache gets: keys and values repeated for every query head. "static" is a StaticCache under
a boolean mask with grouped heads. "folded" moves the query heads of a key-value head to the token axis.
"""

from __future__ import annotations

import functools

import numpy as np

from rivals.interface import COPIES, Case, Rival, Step


def prepare(way: str, dtype: str, case: Case) -> Step:
    """A step of one of the three ways."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    torch.set_num_threads(case.threads)
    query, key, value = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in case.data())
    caches = [(key.clone(), value.clone()) for _ in range(COPIES)]
    mask = torch.ones(1, 1, 1, case.tokens, dtype=torch.bool)
    group = case.q_heads // case.heads

    def repeat_kv(i: int) -> torch.Tensor:
        key, value = (x.repeat_interleave(group, 1) for x in caches[i % COPIES])
        return sdpa(query, key, value)

    def folded(i: int) -> torch.Tensor:
        return sdpa(query.view(1, case.heads, group, case.head_dim), *caches[i % COPIES])

    def static(i: int) -> torch.Tensor:
        return sdpa(query, *caches[i % COPIES], attn_mask=mask, enable_gqa=True)

    call = {"repeat_kv": repeat_kv, "folded": folded, "static": static}[way]

    def step(i: int) -> np.ndarray:
        with torch.inference_mode():
            return call(i).float().numpy()

    return step


RIVALS = tuple(
    Rival(f"SDPA {way} {label}", "torch", bits, functools.partial(prepare, way, dtype))
    for dtype, label, bits in (("bfloat16", "bf16", 16), ("float32", "fp32", 32))
    for way in ("repeat_kv", "folded", "static")
)
