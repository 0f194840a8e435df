"""Decode attention of one layer: ours, the 16-bit ways that a user has, and a plain read of the bytes of each."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.caches import SPARE, held_bytes, random_state
from gpu.machine import fastest_reader, reading
from gpu.section import Section
from gpu.timing import Call, Checked, check_attention, interleaved
from innerq_compile import ops
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import LayerState

PRESETS = ("base", "small", "int4", "int8")
CHECKED_HEADS = 4
"""Key-value heads, of the first row, whose outputs are compared with float64: all of a long cache would not fit."""

READ_AT_MOST = 2**30
"""Bytes of the plain read beside a contender that needs more: in proportion, for its buffer has to fit as well."""

K = 1024
SHAPES = {"gqa": (32, 8, 128), "mha": (32, 32, 128)}
CASES = {
    "gqa": ((1, (32 * K, 128 * K, 8 * K, 4 * K, 64 * K, 16 * K, 256 * K, K)),
            (8, (8 * K, 32 * K, K, 4 * K, 128 * K, 256 * K)), (64, (4 * K, K, 32 * K, 128 * K))),
    "mha": ((1, (8 * K, 32 * K, K, 4 * K, 128 * K, 256 * K)), (8, (4 * K, K, 32 * K)), (64, (K, 4 * K, 32 * K))),
}  # fmt: skip
"""Part -> batches and contexts, in order of value."""

FLEX = {("gqa", 1, 32 * K), ("gqa", 8, 32 * K), ("gqa", 1, 128 * K), ("mha", 1, 32 * K)}
"""Cases that FlexAttention is compiled for, some seconds each."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Case(NamedTuple):
    """One line of the table."""

    q_heads: int
    heads: int
    head_dim: int
    batch: int
    context: int

    @property
    def bf16_bytes(self) -> int:
        """Keys and values of all tokens."""
        return 4 * self.batch * self.heads * self.context * self.head_dim


def run(section: Section) -> None:
    """Rows ``attention``: one per case and way; a case that does not fit or comes too late is a row that says so."""
    reader = fastest_reader(section)
    shape, batches = ((4, 2, 32), ((2, (200,)),)) if section.dry else (SHAPES[section.part], CASES[section.part])
    for case in (Case(*shape, batch, context) for batch, contexts in batches for context in contexts):
        if section.seconds_left() < 3:
            section.emit("attention", **case._asdict(), skipped="not reached")
            continue
        with section.attempt(**case._asdict()):
            _measure(section, case, reader, flex=(section.part, case.batch, case.context) in FLEX)


def _measure(section: Section, case: Case, reader: tuple[int, int, int], flex: bool) -> None:
    """Checks and times one case."""
    query = torch.randn(case.batch, case.q_heads, 1, case.head_dim, device=section.device, dtype=section.dtype)
    calls: dict[str, Call] = {}
    sizes: dict[str, int] = {}
    checks: dict[str, Checked] = {}
    if section.free_bytes() > 1.5 * case.bf16_bytes:
        shape = (case.batch, case.heads, case.context, case.head_dim)
        pair = [torch.randn(shape, device=section.device, dtype=section.dtype) for _ in range(2)]
        for name, attend in _rivals(section, case, flex).items():
            calls[name], sizes[name] = functools.partial(attend, query, *pair), case.bf16_bytes
            with section.attempt(**case._asdict(), way=name):
                checks[name] = _check(case, calls[name]().reshape(query.shape), query, *pair)
    for preset in PRESETS:
        with section.attempt(**case._asdict(), way=preset):
            config = InnerQConfig.from_preset(preset)
            state = random_state(config, *case[3:4], *case[1:3], case.context, section.device, section.dtype)
            # In a dry run without rounding: a CPU's kernels round to integers, which this budget is not for.
            arguments = (query, *state, None, case.head_dim**-0.5, case.context + SPARE, config.spec, section.dry)
            calls[preset] = functools.partial(ops.decode_attention, *arguments)
            sizes[preset] = held_bytes(state, config, case.context)
            checks[preset] = _check(case, calls[preset](), query, *_dequantized(state, config, case))
    good = [name for name in calls if name in checks and checks[name].ok]
    read = {name: min(sizes[name], READ_AT_MOST) for name in good}
    memory = torch.zeros(max(read.values(), default=0) // 4, dtype=torch.int32, device=section.device)
    reads = {f"read {size}": reading(section, memory[: size // 4], reader) for size in set(read.values())}
    timings = interleaved(section, {name: calls[name] for name in good} | reads)
    ways = [name for name in good if name in timings and name not in PRESETS]
    best = min(ways, key=lambda name: timings[name].us, default=None)
    for name in checks:
        row: dict[str, Any] = {**case._asdict(), "way": name} | dataclasses.asdict(checks[name])
        if name in timings:
            ceiling_us = timings[f"read {read[name]}"].us * sizes[name] / read[name]
            row |= timings[name].row(sizes[name]) | {"share_of_ceiling": round(ceiling_us / timings[name].us, 4)}
            row |= {"best_bf16": best, "speedup": round(timings[best].us / timings[name].us, 3)} if best else {}
        section.emit("attention", **row)


def _check(case: Case, out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Checked:
    """Of some heads of the first row."""
    heads = min(CHECKED_HEADS, case.heads)
    q_heads = heads * case.q_heads // case.heads
    return check_attention(out[:1, :q_heads], query[:1, :q_heads], keys[:1, :heads], values[:1, :heads])


def _rivals(section: Section, case: Case, flex: bool) -> dict[str, Attend]:
    """Name -> function of query [B, Hq, 1, D] and keys, values [B, H, N, D]: SDPA, FA3, FlashInfer, FlexAttention.

    ``stacked`` hands the query heads of a key-value head over as query tokens, which for one new token and no mask is
    the same attention and reads the cache once.
    """

    def stacked(backend: SDPBackend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query.view(case.batch, case.heads, -1, case.head_dim), key, value)

    def grouped(backend: SDPBackend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    if section.dry:
        return {"math stacked": functools.partial(stacked, SDPBackend.MATH)}
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found: dict[str, Attend] = {f"{name} stacked": functools.partial(stacked, way) for name, way in backends.items()}
    if case.q_heads > case.heads:
        found |= {f"{name} enable_gqa": functools.partial(grouped, backends[name]) for name in ("flash", "cudnn")}
    if fa3 := _import(
        "flash_attn_interface"
    ):  # [B, N, H, D]: a transposed view has each head's bytes in the same order
        found["FA3"] = lambda q, k, v: fa3.flash_attn_with_kvcache(*(x.transpose(1, 2) for x in (q, k, v)))
    if case.batch == 1 and (flashinfer := _import("flashinfer")):
        found["FlashInfer"] = lambda q, k, v: flashinfer.single_decode_with_kv_cache(
            q[0, :, 0], k[0], v[0], kv_layout="HND", use_tensor_cores=True
        )
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()
        found["FlexAttention"] = torch.compile(functools.partial(flex_attention, enable_gqa=True), dynamic=False)
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # noqa: BLE001 a package that breaks at import is as good as absent
        return None


def _dequantized(state: LayerState, config: InnerQConfig, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, CHECKED_HEADS, context, D] of the first row, float64, from the reference."""
    heads = min(CHECKED_HEADS, case.heads)
    part = LayerState(*(x[:1, :heads] if x.dim() > 2 else x[:1] if x.dim() > 1 else x for x in state))
    return reference.dequantize_kv(part, config, case.context, torch.float64)
