"""The 16-bit ways to the same attention that a user has: SDPA's backends, FlexAttention, FA3 and FlashInfer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Pair = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa_ways(group: int, device: torch.device) -> dict[str, Attend]:
    """Name -> function of query [B, Hq, 1, D] and keys, values [B, H, N, D] that returns the numbers of [B, Hq, 1, D].

    ``stacked`` hands the ``group`` query heads of a key-value head over as query tokens, which for one new token and no
    mask is the same attention and reads the cache once.
    """
    if device.type != "cuda":
        return {"math stacked": functools.partial(_stacked, SDPBackend.MATH)}
    ways: dict[str, Attend] = {}
    for name, backend in BACKENDS.items():
        ways[f"{name} stacked" if group > 1 else name] = functools.partial(_stacked, backend)
    if group > 1:
        for name in ("flash", "cudnn"):
            ways[f"{name} enable_gqa"] = functools.partial(_grouped, BACKENDS[name])
    return ways


def _stacked(backend: SDPBackend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        stacked = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        return scaled_dot_product_attention(stacked, key, value)


def _grouped(backend: SDPBackend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)


def flex_way() -> Attend:
    """FlexAttention, compiled; a single query token makes it choose its decode kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(functools.partial(flex_attention, enable_gqa=True), dynamic=False)


def other_ways(batch: int) -> dict[str, Attend]:
    """Packages that are not part of torch, where they can be imported."""
    found: dict[str, Attend] = {}
    fa3 = _import("flash_attn_interface")
    if fa3 is not None:
        # Its layout is [B, N, H, D]; a transposed view has the same bytes in the same order per head.
        found["FA3"] = lambda q, k, v: fa3.flash_attn_with_kvcache(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)
    flashinfer = _import("flashinfer")
    if flashinfer is not None and batch == 1:
        found["FlashInfer"] = lambda q, k, v: flashinfer.single_decode_with_kv_cache(
            q[0, :, 0], k[0], v[0], kv_layout="HND", use_tensor_cores=True
        )[None, :, None]
    return found


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except Exception:  # noqa: BLE001 a package that breaks at import is as good as absent
        return None
