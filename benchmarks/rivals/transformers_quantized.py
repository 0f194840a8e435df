"""transformers' QuantizedCache with quanto's and HQQ's 4-bit quantizers.

Its best case: the residual window is so long that no step ever quantizes. A step appends one token and dequantizes the
whole cache, because update() does both; then comes the fastest SDPA, query heads folded into the token axis.
"""

from __future__ import annotations

import functools
import importlib

import numpy as np

from rivals.interface import COPIES, Case, Rival, Step


def prepare(backend: str, case: Case) -> Step:
    """A step over a cache that this backend ("quanto" or "hqq") quantizes."""
    importlib.import_module({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])  # before what takes seconds
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    from transformers import LlamaConfig, QuantizedCache

    torch.set_num_threads(case.threads)
    query, key, value = (torch.from_numpy(x).bfloat16() for x in case.data())  # float32 takes 1.4 times as long
    model = LlamaConfig(num_hidden_layers=1, num_attention_heads=case.q_heads, num_key_value_heads=case.heads)
    caches = []
    for _ in range(COPIES):
        cache = QuantizedCache(backend, model, nbits=4, q_group_size=64, residual_length=10**9)
        cache.update(key[:, :, :-1], value[:, :, :-1], 0)
        caches.append(cache)
    one = key[:, :, -1:], value[:, :, -1:]

    def step(i: int) -> np.ndarray:
        with torch.inference_mode():
            out = sdpa(query.view(1, case.heads, -1, case.head_dim), *caches[i % COPIES].update(*one, 0))
            return out.float().numpy()

    return step


RIVALS = tuple(
    Rival(f"QuantizedCache {backend} 4 bit", package, 4, functools.partial(prepare, backend), appends=True)
    for backend, package in (("quanto", "optimum-quanto"), ("hqq", "hqq"))
)
