"""Section 1: every kernel on this device against the reference: stored bytes bit for bit, attention within its budget.

The reference runs on the CPU on copies of the same tokens, so nothing of the device's own arithmetic is trusted.
"""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch

from gpu_suite import errors
from gpu_suite.context import Context
from innerq_compile import ops, reference
from innerq_compile.config import PRESETS, InnerQConfig
from innerq_compile.kernels import triton
from innerq_compile.layout import PADS, SLOTS, LayerState, allocate_state

Kernel: TypeAlias = Callable[..., Any]


FEW = ((1, "none", False), (5, "bool", True))
SOME = (*FEW, (1, "bool", False), (1, "none", True))
ALL = tuple(itertools.product((1, 5), ("none", "bool", "additive"), (False, True)))
"""(query tokens, mask, exact) of the attention that a setup is checked with: each is a kernel to compile."""


class Setup(NamedTuple):
    """A cache and the tokens that it is given, chunk by chunk."""

    config: InnerQConfig
    q_heads: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    pads: int = 3
    chunks: tuple[int, ...] = (300, 1, 1, 31, 64, 1)
    capacity: int = 512
    calls: tuple[tuple[int, str, bool], ...] = FEW


def setups(part: str, dry: bool) -> Iterator[Setup]:
    """What one process checks; ``part`` is one of :data:`gpu_suite.plan.SECTIONS`."""
    shapes = [(4, 2, 32)] if dry else [(32, 8, 128), (32, 32, 128), (32, 8, 64)]
    preset, _, rest = part.partition("/")
    if rest == "masks":
        if not dry:
            yield Setup(InnerQConfig.from_preset(preset), 8, 2, 128, torch.float16, pads=0, calls=ALL)
    elif preset in PRESETS:
        config = InnerQConfig.from_preset(preset)
        if dry:  # in float16, because Triton's interpreter rounds to bfloat16 in a way of its own
            yield Setup(config, *shapes[0], dtype=torch.float16, chunks=(200, 1, 31), capacity=256)
        else:
            yield Setup(config, *shapes[0], calls=SOME)
            yield Setup(config, 32, 8, 128, chunks=(2900, 1, 33, 1), capacity=3072)
            yield from (Setup(config, *shape) for shape in shapes[1:])
            yield Setup(config, 8, 2, 128, torch.float16, pads=0)
    elif part in ("asymmetric", "hybrid keys"):
        mode = part.split()[0]
        for bits in (3,) if dry else (2, 3, 4, 8):
            config = InnerQConfig(key_bits=bits, value_bits=bits, key_mode=mode, value_mode=mode)
            yield Setup(config, *shapes[0])
    elif part == "paper":
        for name in ("paper-base", "paper-small", "paper-hybrid"):
            yield Setup(InnerQConfig.from_preset(name), *shapes[0])
    elif part.startswith("shapes"):
        options: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
            ({}, (3, 1, 96)),
            ({"key_norm": "off"}, (4, 4, 32)),
            ({"key_center": "runtime"}, (4, 2, 32)),
            ({"group_size": 16}, (8, 8, 64)),
            ({"group_size": 64}, (8, 1, 64)),
            ({"sink": 0, "recent": 1}, (6, 2, 128)),
            ({"sink": 5, "recent": 40, "flush": 64}, (16, 2, 256)),  # takes longest to compile
        ]
        third = int(part.split()[1]) - 1
        for settings, shape in options[third : third + 1] if dry else options[third::3]:
            config = InnerQConfig(**settings)
            yield Setup(config, *shape, dtype=torch.float32, calls=ALL if dry else FEW if settings else SOME)


def run(context: Context) -> None:
    """Rows ``checks``: one per setup and op; ``ok`` says whether it holds, ``reason`` where it raised."""
    checks = {"append_kv": _check_append, "dequantize_kv": _check_dequantize, "decode_attention": _check_decode}
    kernels = {name: kernel_of(context, name) for name in checks}
    for setup in setups(context.part, context.dry):
        for name, check in checks.items():
            if context.seconds_left() < 0:
                context.emit("late", part=context.part, op=name, spec=setup.config.spec)
                continue
            _record(context, setup, name, functools.partial(check, setup, context.device, kernels[name]))


def kernel_of(context: Context, name: str) -> Callable[..., Any]:
    """The op; in the first part of a dry run its Triton launcher, where it has one, in Triton's interpreter."""
    if context.dry and context.part == "base" and name in triton.OPS:
        return getattr(import_module(f"{triton.__name__}.{name}"), name)
    return getattr(ops, name)


def _record(context: Context, setup: Setup, op: str, check: Callable[[], Iterator[dict[str, Any]]]) -> None:
    row = {
        "part": context.part, "shape": f"{setup.q_heads}/{setup.heads}/{setup.head_dim}", "op": op,
        "dtype": str(setup.dtype).removeprefix("torch."), "spec": setup.config.spec,
    }  # fmt: skip
    try:
        for found in check():
            context.emit("checks", **row, **found)
    except Exception as error:  # noqa: BLE001 the other ops are still worth checking
        errors.raise_if_lost(error)  # it would fail everything after it: that is one error, not many
        reason = traceback.format_exc(limit=-6)[-1500:]
        context.emit("checks", **row, ok=False, reason=reason)


def _check_append(setup: Setup, device: torch.device, append_kv: Kernel) -> Iterator[dict[str, Any]]:
    """Every buffer after every chunk."""
    theirs, ours = _empty(setup, torch.device("cpu")), _empty(setup, device)
    for number, (key, value) in enumerate(_tokens(setup)):
        reference.append_kv(key, value, theirs, setup.config)
        append_kv(key.to(device), value.to(device), *ours, setup.capacity, setup.config.spec)
        wrong = _differing(ours, theirs)
        yield {"ok": not wrong, "chunk": number, "tokens": key.shape[2], **({"reason": wrong} if wrong else {})}
        if wrong:
            return


def _check_dequantize(setup: Setup, device: torch.device, dequantize_kv: Kernel) -> Iterator[dict[str, Any]]:
    """The whole cache as the model sees it."""
    state = _filled(setup)
    wanted = reference.dequantize_kv(state, setup.config, setup.capacity)
    got = dequantize_kv(*_on(state, device), setup.capacity, setup.config.spec)
    places = sum(int((a.cpu() != b).sum()) for a, b in zip(got, wanted, strict=True))
    yield {"ok": places == 0, "differing": places}


def _check_decode(setup: Setup, device: torch.device, decode_attention: Kernel) -> Iterator[dict[str, Any]]:
    """Attention of 1 and of several tokens, rounded and exact, with no mask, a boolean and an additive one."""
    state, config = _filled(setup), setup.config
    keys, values = reference.dequantize_kv(state, config, setup.capacity, torch.float64)
    sm_scale = setup.head_dim**-0.5
    generator = torch.Generator().manual_seed(1)
    for q_len in (1, 5):
        query = torch.randn(setup.batch, setup.q_heads, q_len, setup.head_dim, generator=generator).to(setup.dtype)
        for kind, mask in _masks(setup, q_len, generator).items():
            bias = _bias(state, q_len, mask, setup.capacity)
            wanted = reference.decode_attention(query, state, mask, sm_scale, config, setup.capacity, torch.float64)
            plain = errors.attention64(query, keys, values, sm_scale, bias).to(wanted.dtype)
            if not torch.allclose(plain.float(), wanted.float(), rtol=2 * torch.finfo(wanted.dtype).eps):
                raise AssertionError("the suite's own float64 attention differs from the reference")
            for exact in (False, True):
                if (q_len, kind, exact) not in setup.calls:
                    continue
                on_device = None if mask is None else mask.to(device)
                out = decode_attention(
                    query.to(device), *_on(state, device), on_device, sm_scale, setup.capacity, config.spec, exact
                ).cpu()
                checked = errors.check(out, query, keys, values, sm_scale, bias, exact=exact)
                yield {
                    "ok": checked.ok, "q_len": q_len, "mask": kind, "exact": exact, "error": checked.error,
                    "budget": checked.budget,
                }  # fmt: skip


def _masks(setup: Setup, q_len: int, generator: torch.Generator) -> dict[str, torch.Tensor | None]:
    allowed = torch.rand(setup.batch, 1, q_len, setup.capacity, generator=generator) < 0.8
    additive = torch.randn(1, setup.q_heads, q_len, setup.capacity, generator=generator)
    return {"none": None, "bool": allowed, "additive": additive.to(setup.dtype)}


def _bias(state: LayerState, q_len: int, mask: torch.Tensor | None, capacity: int) -> torch.Tensor:
    """The mask as a float64 bias, with empty slots and pads, and without a mask the future, at minus infinity."""
    slot = torch.arange(capacity)
    slots, pads = (state.counts[:, column, None, None, None] for column in (SLOTS, PADS))
    visible = (slot < slots) & (slot >= pads)
    bias = torch.zeros((), dtype=torch.float64)
    if mask is None:
        visible = visible & (slot <= slots - q_len + torch.arange(q_len)[:, None])
    elif mask.dtype == torch.bool:
        visible = visible & mask
    else:
        bias = mask.double()
    return torch.where(visible, bias, float("-inf"))


def _empty(setup: Setup, device: torch.device) -> LayerState:
    state = allocate_state(
        setup.config, batch_size=setup.batch, num_kv_heads=setup.heads, head_dim=setup.head_dim,
        capacity=setup.capacity, dtype=setup.dtype, device=device,
    )  # fmt: skip
    state.counts[0, PADS] = setup.pads
    return state


def _tokens(setup: Setup) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for count in setup.chunks:
        shape = (setup.batch, setup.heads, count, setup.head_dim)
        key, value = (torch.randn(shape, generator=generator) for _ in range(2))
        yield (2 * key).to(setup.dtype), (value + 0.3).to(setup.dtype)


def _filled(setup: Setup) -> LayerState:
    state = _empty(setup, torch.device("cpu"))
    for key, value in _tokens(setup):
        reference.append_kv(key, value, state, setup.config)
    return state


def _on(state: LayerState, device: torch.device) -> LayerState:
    return LayerState(*(buffer.to(device) for buffer in state))


def _differing(ours: LayerState, theirs: LayerState) -> str:
    """The buffers that differ, and in how many places; a zero's sign carries no meaning, a scale's does."""
    found = []
    for name, a, b in zip(LayerState._fields, ours, theirs, strict=True):
        a = a.cpu()
        if not name.endswith(("zeros", "window")):
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        places = int((a != b).sum())
        if places:
            found.append(f"{name}: {places} of {a.numel()}")
    return ", ".join(found)
