"""Section 2: decode attention of one layer, ours against the best 16-bit way, cold cache, under a CUDA graph."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import torch

from gpu_suite import errors, goals, rivals
from gpu_suite.context import Context
from gpu_suite.environment import l2_bytes
from gpu_suite.jobs import read_rows
from gpu_suite.journal import TIMING, Journal
from gpu_suite.memory_read import best_reader
from gpu_suite.states import SPARE, copies_of, held_bytes, random_state
from gpu_suite.timing import Contender, copies_for, interleave
from innerq_compile import ops, reference
from innerq_compile.config import InnerQConfig
from innerq_compile.layout import LayerState

PRESETS = ("base", "small", "int4", "int8")
WRONG = " (wrong)"
"""After the name of a preset whose result is wrong: it is timed all the same, and no table shows it."""

CHECKED_HEADS = 4
"""Key-value heads, of the first row, whose outputs are compared with float64: all of a long cache would not fit."""


class Case(NamedTuple):
    """One line of the table."""

    q_heads: int
    heads: int
    head_dim: int
    batch: int
    context: int

    @property
    def name(self) -> str:
        """One word."""
        return "/".join(map(str, self))

    @property
    def bf16_bytes(self) -> int:
        """Keys and values of all tokens."""
        return 4 * self.batch * self.heads * self.context * self.head_dim


GQA, MHA = (32, 8, 128), (32, 32, 128)
K = 1024
_CONTEXTS = (32 * K, 128 * K, 8 * K, 4 * K, 64 * K, 16 * K, 256 * K, K)
CASES = [
    *(Case(*GQA, 1, n) for n in _CONTEXTS),
    *(Case(*GQA, 8, n) for n in (8 * K, 32 * K, K, 4 * K, 128 * K, 256 * K)),
    *(Case(*MHA, 1, n) for n in (8 * K, 32 * K, K, 4 * K, 128 * K, 256 * K)),
    *(Case(*GQA, 64, n) for n in (4 * K, K, 32 * K, 128 * K)),
    *(Case(*MHA, 8, n) for n in (4 * K, K, 32 * K)),
    *(Case(*MHA, 64, n) for n in (K, 4 * K, 32 * K)),
]
WARMED = (1, 4 * K)
"""Batch and context that the kernels are compiled with: they are the same for all others."""

DRY_CASES = [Case(4, 2, 32, 2, 200), Case(2, 2, 32, 1, 200)]
FLEX_CASES = [Case(*GQA, 1, 32 * K), Case(*GQA, 8, 32 * K), Case(*GQA, 1, 128 * K), Case(*MHA, 1, 32 * K)]


def run(context: Context) -> None:
    """Rows ``attention``, then rows ``flex``; each case that does not fit or comes too late is a row that says so."""
    ceiling = 1.0
    if not context.dry:
        ceiling = best_reader(context.device)[1]
    context.emit("ceiling", gb_per_s=round(ceiling, 1))
    journal = Journal(context)
    best_ways = {
        Case(*(row[name] for name in Case._fields)): row["best_bf16"]
        for row in read_rows(context.rows).get("attention", []) if "best_bf16" in row
    }  # fmt: skip
    cases = (
        DRY_CASES
        if context.dry
        else [case for case in CASES if (case.heads == case.q_heads) == (context.part == "mha")]
    )
    for case in cases:
        if journal.has(case.name):
            continue
        # FlexAttention's share of the time; a case takes about two seconds.
        if context.seconds_left() < (0 if context.dry else 20):
            context.emit("attention", **case._asdict(), skipped="out of time")
            continue
        try:
            best_ways[case] = _run_case(context, journal, case, ceiling)
        except torch.cuda.OutOfMemoryError:
            context.emit("attention", **case._asdict(), skipped="does not fit the memory")
        journal.done(case.name)
        _free(context.device)
    for case in FLEX_CASES:
        name = f"flex {case.name}"
        if case in best_ways and context.seconds_left() > 5 and not journal.has(name):
            journal.begin(name, TIMING)
            _run_flex(context, case, best_ways[case])
            journal.done(name)
            _free(context.device)


def warm(context: Context) -> None:
    """Compiles what :func:`run` will need for the preset that the part names, into the cache on disk."""
    for shape in (GQA, MHA):
        case, preset = Case(*shape, *WARMED), context.part.split()[1]
        ours(_query(context, case), _state(context, case, preset)[0], preset, case)


def warm_flex(context: Context) -> None:
    """The same for FlexAttention."""
    for case in FLEX_CASES:
        torch._dynamo.reset()
        rivals.flex_way()(_query(context, case), *_pair(context, case))
        _free(context.device)


def ours(query: torch.Tensor, state: LayerState, preset: str, case: Case) -> torch.Tensor:
    """The call that a compiled model makes."""
    spec = InnerQConfig.from_preset(preset).spec
    return ops.decode_attention(query, *state, None, case.head_dim**-0.5, case.context + SPARE, spec)


def _run_case(context: Context, journal: Journal, case: Case, ceiling: float) -> str:
    """Checks and times one case; returns the name of the best 16-bit way."""
    l2, query = l2_bytes(context.device), _query(context, case)
    contenders: dict[str, Contender] = {}
    checked: dict[str, errors.Checked] = {}
    failed: dict[str, str] = {}
    fits = not context.dry and _free_bytes(context.device) > 1.5 * case.bf16_bytes
    if fits or context.dry:
        contenders |= _rival_contenders(context, journal, case, query, l2, checked, failed)
    rival_names = set(contenders)
    for preset in context.without_broken(PRESETS):
        if preset in journal.broken:
            continue
        journal.begin(case.name, preset)
        try:
            state, size = _state(context, case, preset)
            out = ours(query, state, preset, case)
            result = _check(query, state, preset, case, out)
            name = preset if result.ok else preset + WRONG
            checked[name] = result
            copies = copies_of(state, copies_for(size, context.device, l2, _free_bytes(context.device) / 2))
        except Exception as error:  # noqa: BLE001 the other presets are still worth their row
            errors.raise_if_lost(error)
            failed[preset] = f"{type(error).__name__}: {error}"[:500]
            continue
        contenders[name] = Contender(
            lambda i, copies=copies, preset=preset: ours(query, copies[i % len(copies)], preset, case),
            len(copies), size,
        )  # fmt: skip
    timings = interleave(
        contenders, context.device, rounds=1 if context.dry else 11, failed=failed,
        begin=lambda name: journal.begin(case.name, name.removesuffix(WRONG)),
    )  # fmt: skip
    ways = [name for name in timings if name in rival_names]
    best = min(ways, key=lambda name: timings[name].us) if ways else None
    for name, timing in timings.items():
        row: dict[str, Any] = {**case._asdict(), "way": name, "bytes": contenders[name].bytes}
        row |= timing.row(contenders[name].bytes) | {"copies": contenders[name].copies}
        row |= {"share_of_ceiling": round(contenders[name].bytes / timing.us / 1e3 / ceiling, 4)}
        row |= {"error": checked[name].error, "budget": checked[name].budget}
        if best:
            row |= {"best_bf16": best, "speedup": round(timings[best].us / timing.us, 3)}
        context.emit("attention", **row, **goals.of_attention(row) if name in PRESETS else {})
    for name, result in checked.items():
        if not result.ok:
            context.emit("wrong", **case._asdict(), way=name, error=result.error, budget=result.budget)
    for name, error in failed.items():
        context.emit("failed", **case._asdict(), way=name, reason=error)
    return best or ""


def _rival_contenders(
    context: Context, journal: Journal, case: Case, query: torch.Tensor, l2: int, checked: dict[str, errors.Checked],
    failed: dict[str, str],
) -> dict[str, Contender]:  # fmt: skip
    pair, size = _pair(context, case), case.bf16_bytes
    count = copies_for(size, context.device, l2, _free_bytes(context.device) / 3)
    pairs = [pair, *(tuple(x.clone() for x in pair) for _ in range(count - 1))]
    ways = rivals.sdpa_ways(case.q_heads // case.heads, context.device) | rivals.other_ways(case.batch)
    found = {}
    for name, attend in ways.items():
        if name in journal.broken:
            continue
        journal.begin(case.name, name)
        try:
            checked[name] = _check_rival(attend(query, *pair), query, *pair)
        except Exception as error:  # noqa: BLE001 a backend that refuses these shapes is no contender
            errors.raise_if_lost(error)
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        if checked[name].ok:
            found[name] = Contender(
                lambda i, attend=attend, pairs=pairs: attend(query, *pairs[i % len(pairs)]), count, size
            )
    return found


def _run_flex(context: Context, case: Case, best: str) -> None:
    """FlexAttention against the best of the others, in turns."""
    query, pair, l2 = _query(context, case), _pair(context, case), l2_bytes(context.device)
    count = copies_for(case.bf16_bytes, context.device, l2, _free_bytes(context.device) / 3)
    pairs = [pair, *(tuple(x.clone() for x in pair) for _ in range(count - 1))]
    torch._dynamo.reset()
    known = rivals.sdpa_ways(case.q_heads // case.heads, context.device) | rivals.other_ways(case.batch)
    ways = {"FlexAttention": rivals.flex_way(), **({best: known[best]} if best in known else {})}
    failed: dict[str, str] = {}
    try:
        result = _check_rival(ways["FlexAttention"](query, *pair), query, *pair)
        contenders = {
            name: Contender(lambda i, attend=attend: attend(query, *pairs[i % count]), count, case.bf16_bytes)
            for name, attend in ways.items()
        }
        timings = interleave(contenders, context.device, failed=failed) if result.ok else {}
    except Exception as error:  # noqa: BLE001 its row says why
        errors.raise_if_lost(error)
        context.emit("failed", **case._asdict(), way="FlexAttention", reason=f"{type(error).__name__}: {error}"[:500])
        return
    for name, timing in timings.items():
        context.emit("flex", **case._asdict(), way=name, error=result.error, **timing.row(case.bf16_bytes))
    for name, reason in failed.items():
        context.emit("failed", **case._asdict(), way=name, reason=reason)


def _query(context: Context, case: Case) -> torch.Tensor:
    dtype = torch.float32 if context.dry else torch.bfloat16
    return torch.randn(case.batch, case.q_heads, 1, case.head_dim, device=context.device, dtype=dtype)


def _pair(context: Context, case: Case) -> rivals.Pair:
    dtype = torch.float32 if context.dry else torch.bfloat16
    shape = (case.batch, case.heads, case.context, case.head_dim)
    key, value = (torch.randn(shape, device=context.device, dtype=dtype) for _ in range(2))
    return key, value


def _state(context: Context, case: Case, preset: str) -> tuple[LayerState, int]:
    """A cache of this preset and the bytes of it that a step reads."""
    config = InnerQConfig.from_preset(preset)
    state = random_state(
        config, batch=case.batch, heads=case.heads, head_dim=case.head_dim, context=case.context,
        device=context.device, dtype=torch.float32 if context.dry else torch.bfloat16,
    )  # fmt: skip
    return state, held_bytes(state, config, case.context)


def _check(query: torch.Tensor, state: LayerState, preset: str, case: Case, out: torch.Tensor) -> errors.Checked:
    config, heads = InnerQConfig.from_preset(preset), min(CHECKED_HEADS, case.heads)
    part = LayerState(*(x[:1, :heads] if x.dim() > 2 else x[:1] if x.dim() > 1 else x for x in state))
    keys, values = reference.dequantize_kv(part, config, case.context, torch.float64)
    q_heads = heads * (case.q_heads // case.heads)
    return errors.check(
        out[:1, :q_heads], query[:1, :q_heads], keys, values, case.head_dim**-0.5, exact=False
    )  # fmt: skip


def _check_rival(out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> errors.Checked:
    heads = min(CHECKED_HEADS, key.shape[1])
    q_heads = heads * (query.shape[1] // key.shape[1])
    out = out.reshape(query.shape)
    return errors.check(
        out[:1, :q_heads], query[:1, :q_heads], key[:1, :heads], value[:1, :heads], query.shape[3] ** -0.5, exact=True
    )


def _free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else float("inf")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
