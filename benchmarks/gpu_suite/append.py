"""Section 4: what a decode step pays to append its token, and how fast a prompt is quantized."""

from __future__ import annotations

import torch

from gpu_suite import errors
from gpu_suite.context import Context
from gpu_suite.environment import l2_bytes
from gpu_suite.journal import Journal
from gpu_suite.states import SPARE, random_state
from gpu_suite.timing import Contender, copies_for, interleave
from innerq_compile import ops
from innerq_compile.config import InnerQConfig
from innerq_compile.layout import LayerState, allocate_state

PRESETS = ("base", "small", "hybrid", "int4", "int8")
HEADS, HEAD_DIM = 8, 128
CONTEXTS = (4096, 32768)
BATCHES = (1, 8)
LONGEST = 65536
"""Tokens of all rows together that are worth quantizing at once here."""


def run(context: Context) -> None:
    """Rows ``append``: microseconds per step (mean over a flush period); rows ``prefill``: GB/s of 16-bit numbers."""
    journal = Journal(context)
    for batch in (1,) if context.dry else BATCHES:
        for length in (200,) if context.dry else CONTEXTS:
            for preset in PRESETS[:2] if context.dry else context.without_broken(PRESETS):
                case = f"{preset} {batch} {length}"
                if preset in journal.broken or journal.has(case):
                    continue
                if context.seconds_left() < 2 and not context.dry:
                    return
                journal.begin(case, preset)
                try:
                    _measure(context, preset, batch, length)
                except Exception as error:  # noqa: BLE001 the other presets are still worth their row
                    errors.raise_if_lost(error)
                    context.emit("failed", case=case, reason=f"{type(error).__name__}: {error}"[:500])
                journal.done(case)


def warm(context: Context) -> None:
    """Compiles the kernels of :func:`run`."""
    for preset in PRESETS:
        config, (key, value) = InnerQConfig.from_preset(preset), _tokens(context, 1, 200)
        state = _empty(context, config, 1, 264)
        ops.append_kv(key, value, *state, 264, config.spec)
        ops.append_kv(key[:, :, :1], value[:, :, :1], *state, 264, config.spec)


def _measure(context: Context, preset: str, batch: int, length: int) -> None:
    config = InnerQConfig.from_preset(preset)
    row = {"preset": preset, "batch": batch, "heads": HEADS, "head_dim": HEAD_DIM, "context": length}
    rounds = 1 if context.dry else 9
    capacity = length + SPARE
    state = random_state(
        config, batch=batch, heads=HEADS, head_dim=HEAD_DIM, context=length, device=context.device,
        dtype=torch.float32 if context.dry else torch.bfloat16,
    )  # fmt: skip
    key, value = _tokens(context, batch, 1)
    counts = state.counts.clone()
    period = config.flush_tokens

    def steps(_: int) -> None:
        state.counts.copy_(counts)
        for _ in range(period):
            ops.append_kv(key, value, *state, capacity, config.spec)

    timing = interleave({"append": Contender(steps, 1, 0)}, context.device, rounds=rounds)["append"]
    context.emit("append", **row, us_per_step=round(timing.us / period, 3), graph=timing.graph)

    if batch * length > LONGEST:
        return
    fresh, prompt = _empty(context, config, batch, capacity), _tokens(context, batch, length)
    size = 2 * prompt[0].numel() * prompt[0].element_size()
    count = copies_for(size, context.device, l2_bytes(context.device))
    prompts = [prompt, *(_tokens(context, batch, length) for _ in range(count - 1))]

    def prefill(i: int) -> None:
        fresh.counts.zero_()
        ops.append_kv(*prompts[i % count], *fresh, capacity, config.spec)

    timing = interleave({"prefill": Contender(prefill, count, size)}, context.device, rounds=rounds)["prefill"]
    context.emit("prefill", **row, bytes=size, **timing.row(size))


def _empty(context: Context, config: InnerQConfig, batch: int, capacity: int) -> LayerState:
    return allocate_state(
        config, batch_size=batch, num_kv_heads=HEADS, head_dim=HEAD_DIM, capacity=capacity,
        dtype=torch.float32 if context.dry else torch.bfloat16, device=context.device,
    )  # fmt: skip


def _tokens(context: Context, batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch, HEADS, count, HEAD_DIM)
    dtype = torch.float32 if context.dry else torch.bfloat16
    key, value = (torch.randn(shape, device=context.device).to(dtype) for _ in range(2))
    return key, value
