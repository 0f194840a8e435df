"""What a decode step pays to append its token, and how fast a prompt is quantized."""

from __future__ import annotations

import torch

from gpu.caches import SPARE, empty_state, random_state
from gpu.section import Section
from gpu.timing import interleaved
from innerq_compile import ops
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import InnerQConfig

PRESETS = ("base", "small", "hybrid", "int4", "int8")
HEADS, HEAD_DIM, CHECKED = 8, 128, 300
LONGEST = 65536
"""Tokens of all rows together that are worth quantizing at once here."""


def run(section: Section) -> None:
    """Rows ``append``: microseconds per step (mean over a flush period); rows ``prefill``: GB/s of 16-bit numbers."""
    for batch, context in ((1, 200),) if section.dry else ((1, 4096), (1, 32768), (8, 4096), (8, 32768)):
        for preset in PRESETS[:2] if section.dry else PRESETS:
            case = {"preset": preset, "batch": batch, "heads": HEADS, "head_dim": HEAD_DIM, "context": context}
            if section.seconds_left() < 2:
                section.emit("append", **case, skipped="not reached")
                continue
            with section.attempt(**case):
                _measure(section, InnerQConfig.from_preset(preset), batch, context, case)


def _measure(section: Section, config: InnerQConfig, batch: int, context: int, case: dict[str, object]) -> None:
    _check(section, config)
    capacity, shape = context + SPARE, (batch, HEADS, HEAD_DIM)
    state = random_state(config, *shape, context, section.device, section.dtype)
    counts, token = state.counts.clone(), _tokens(section, batch, 1)

    def steps() -> None:
        state.counts.copy_(counts)
        for _ in range(config.flush_tokens):
            ops.append_kv(*token, *state, capacity, config.spec)

    timing = interleaved(section, {"append": steps})["append"]
    section.emit("append", **case, us_per_step=round(timing.us / config.flush_tokens, 3))
    if batch * context > LONGEST:
        return
    fresh, prompt = (
        empty_state(config, *shape, capacity, section.device, section.dtype),
        _tokens(section, batch, context),
    )

    def prefill() -> None:
        fresh.counts.zero_()
        ops.append_kv(*prompt, *fresh, capacity, config.spec)

    size = 2 * prompt[0].numel() * prompt[0].element_size()
    section.emit("prefill", **case, **interleaved(section, {"prefill": prefill})["prefill"].row(size))


def _check(section: Section, config: InnerQConfig) -> None:
    """A prompt and two steps against the reference on the CPU, bit for bit.

    Raises:
        AssertionError: A buffer differs.
    """
    ours, theirs = (
        empty_state(config, 1, HEADS, HEAD_DIM, CHECKED + 2, torch.device(device), section.dtype)
        for device in (section.device, "cpu")
    )
    for count in (CHECKED, 1, 1):
        pair = _tokens(section, 1, count)
        ops.append_kv(*pair, *ours, CHECKED + 2, config.spec)
        reference.append_kv(*(x.cpu() for x in pair), theirs, config)
    wrong = [name for name, x, y in zip(ours._fields, ours, theirs, strict=True) if not torch.equal(x.cpu(), y)]
    if wrong:
        raise AssertionError(f"differ from the reference: {', '.join(wrong)}")


def _tokens(section: Section, batch: int, count: int) -> list[torch.Tensor]:
    shape = (batch, HEADS, count, HEAD_DIM)
    return [torch.randn(shape, device=section.device).to(section.dtype) for _ in range(2)]
