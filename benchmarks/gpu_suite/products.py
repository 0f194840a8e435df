"""Section 3, the paper's own experiment: QK^T and AV alone, 16 bit against quantized layouts, best kernel of each.

One query per head is the paper's case (32 heads, D = 128). With four queries per key-value head (8 heads) tensor cores
apply, and the question is whether inner groups are still the better ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from gpu_suite import errors, product_launch, product_layouts
from gpu_suite.context import Context
from gpu_suite.environment import l2_bytes
from gpu_suite.journal import Journal
from gpu_suite.product_layouts import LAYOUTS, Packed
from gpu_suite.timing import Contender, copies_for, interleave
from innerq_compile.config import BLOCK

HEAD_DIM = 128
FP16 = "fp16"
SETTINGS = [(32, 1, n) for n in (32768, 8192, 2048, 512, 16384, 4096, 1024)] + [
    (8, 4, n) for n in (32768, 131072, 4096)
]
"""(heads, queries per head, tokens), in order of value."""

DRY_SETTINGS = [(1, 1, 64), (1, 4, 64)]
PROGRAMS_PER_SM = (4, 16)


Begin = Callable[[str], bool]
"""Told the name of a kernel that is about to run for the first time; false: it is left out."""


class Way(NamedTuple):
    """One kernel on one layout's data, already checked."""

    layout: str
    product: str
    method: str
    call: Callable[[int], torch.Tensor]
    copies: int
    bytes: int
    error: float
    budget: float


def run(context: Context) -> None:
    """Rows ``products``: one per layout, product and kernel at every setting; wrong kernels are not timed."""
    journal = Journal(context)
    for heads, queries, tokens in DRY_SETTINGS if context.dry else SETTINGS:
        case = f"{heads} {queries} {tokens}"
        if journal.has(case):
            continue
        if context.seconds_left() < 4 and not context.dry:
            context.emit("late", heads=heads, queries=queries, tokens=tokens)
            continue
        setting = {"heads": heads, "queries": queries, "tokens": tokens}
        failed: dict[str, str] = {}
        ways = {}

        def begin(name: str, case: str = case) -> bool:
            if name not in journal.broken:
                journal.begin(case, name)
            return name not in journal.broken

        for way in find_ways(context, heads, queries, tokens, failed, begin=begin):
            name = f"{way.layout}|{way.product}|{way.method}"
            if way.error <= way.budget:
                ways[name] = way
            else:
                context.emit("wrong", **setting, way=name, error=way.error, budget=way.budget)
        contenders = {name: Contender(way.call, way.copies, way.bytes) for name, way in ways.items()}
        timings = interleave(
            contenders, context.device, rounds=1 if context.dry else 7, failed=failed,
            begin=lambda name, case=case: journal.begin(case, name),
        )  # fmt: skip
        for name, timing in timings.items():
            row = {key: value for key, value in ways[name]._asdict().items() if key != "call"}
            context.emit("products", **setting, **row, **timing.row(ways[name].bytes))
        for name, reason in failed.items():
            context.emit("failed", **setting, way=name, reason=reason)
        journal.done(case)


def warm(context: Context) -> None:
    """Compiles every kernel of :func:`run` for the queries a head that the part names."""
    heads, queries, tokens = {"1": (32, 1, 512), "4": (8, 4, 4096)}[context.part.split()[1]]
    list(find_ways(context, heads, queries, tokens, {}, copies=1))


def find_ways(
    context: Context, heads: int, queries: int, tokens: int, failed: dict[str, str], copies: int = 0,
    begin: Begin = lambda name: True,
) -> Iterator[Way]:  # fmt: skip
    """Every kernel on every layout, with its error."""
    head_dim = 64 if context.dry else HEAD_DIM
    for product in ("qk", "av"):
        shape = (heads, queries, head_dim if product == "qk" else tokens)
        x = torch.randn(shape, device=context.device) if product == "qk" else torch.rand(shape, device=context.device)
        x = x.half()
        dense = torch.randn(heads, tokens, head_dim, device=context.device).half()
        yield from _fp16_ways(context, product, x, dense, failed, copies, begin)
        for name, layouts in LAYOUTS.items():
            layout = layouts[0 if product == "qk" else 1]
            packed = product_layouts.random_packed(layout, heads, tokens, head_dim, context.device)
            yield from _packed_ways(context, name, product, x, packed, failed, copies, begin)


def _fp16_ways(
    context: Context, product: str, x: torch.Tensor, dense: torch.Tensor, failed: dict[str, str], copies: int,
    begin: Begin,
) -> Iterator[Way]:  # fmt: skip
    keys = product == "qk"
    wanted = x.double() @ (dense.double().transpose(1, 2) if keys else dense.double())
    size = 2 * dense.numel()
    count = copies or copies_for(size, context.device, l2_bytes(context.device), 4e9)
    many = [dense, *(dense.clone() for _ in range(count - 1))]
    # A sum of rounded products, itself rounded to float16 by torch.
    budget = 2 * (torch.finfo(torch.float16).eps + torch.finfo(torch.float32).eps * x.shape[2] ** 0.5)
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torch.matmul": (lambda d: x @ d.transpose(1, 2)) if keys else (lambda d: x @ d)
    }
    if x.shape[1] == 1:
        kernel = product_launch.qk_fp16 if keys else product_launch.av_fp16
        for block, steps in _cuts(context, dense.shape[0], dense.shape[1] // BLOCK, (1, 2)):
            calls[f"fma {block}x{steps}"] = lambda d, block=block, steps=steps: kernel(x, d, steps, block)
    yield from _checked(FP16, product, calls, many, wanted, {}, budget, size, failed, begin)


def _packed_ways(
    context: Context, name: str, product: str, x: torch.Tensor, packed: Packed, failed: dict[str, str],
    copies: int, begin: Begin,
) -> Iterator[Way]:  # fmt: skip
    keys = product == "qk"
    wanted = product_layouts.product(x, product_layouts.decoded(packed), keys=keys)
    rounded = product_layouts.rounding_cost(x, packed, keys=keys)
    eps = torch.finfo(torch.float16).eps
    budgets = {
        "": 2 * (float((rounded - wanted).norm() / wanted.norm()) + eps),
        "fp16": _fp16_budget(x, packed, wanted, keys),
    }
    count = copies or copies_for(packed.bytes, context.device, l2_bytes(context.device), 4e9)
    many = [packed, *(packed.clone() for _ in range(count - 1))]
    heads, blocks = packed.codes.shape[:2]
    calls: dict[str, Callable[[Packed], torch.Tensor]] = {}
    if x.shape[1] == 1:
        kernel = product_launch.qk_words if keys else product_launch.av_words
        for block, steps in _cuts(context, heads, blocks, (2, 4)):
            calls[f"dp4a {block}x{steps}"] = lambda p, block=block, steps=steps: kernel(x, p, steps, block)
    matrices = product_launch.qk_matrices if keys else product_launch.av_matrices
    for int8 in (True, False):
        # One query per head wastes 15 of 16 rows; there one cut is enough.
        cuts = _cuts(context, heads, blocks, (2,), (8,)) if x.shape[1] == 1 else _cuts(context, heads, blocks, (2, 4))
        for block, steps in cuts:
            method = f"mma {'int8' if int8 else 'fp16'} {block}x{steps}"
            calls[method] = lambda p, block=block, steps=steps, int8=int8: matrices(x, p, steps, block, int8)
    yield from _checked(name, product, calls, many, wanted, budgets, budgets[""], packed.bytes, failed, begin)


def _fp16_budget(x: torch.Tensor, packed: Packed, wanted: torch.Tensor, keys: bool) -> float:
    """Products of float16 numbers summed in float32: a rounding of each vector element, seen through large zeros."""
    magnitude = product_layouts.product(x.abs(), product_layouts.decoded(packed).abs(), keys=keys)
    eps = torch.finfo(torch.float16).eps
    return 2 * eps * max(1.0, float(magnitude.norm() / wanted.norm()))


def _checked(
    layout: str, product: str, calls: dict[str, Callable[[Any], torch.Tensor]], many: list[Any], wanted: torch.Tensor,
    budgets: dict[str, float], budget: float, size: int, failed: dict[str, str],
    begin: Begin,
) -> Iterator[Way]:  # fmt: skip
    for method, call in calls.items():
        if not begin(f"{layout}|{product}|{method}"):
            continue
        try:
            error = float((call(many[0]).double() - wanted).norm() / wanted.norm())
        except Exception as caught:  # noqa: BLE001 another kernel may serve this layout
            errors.raise_if_lost(caught)
            failed[f"{layout}|{product}|{method}"] = f"{type(caught).__name__}: {caught}"[:400]
            continue
        allowed = budgets["fp16"] if "fp16" in method else budget
        turn = lambda i, call=call: call(many[i % len(many)])  # noqa: E731 a closure per kernel
        yield Way(layout, product, method, turn, len(many), size, error, allowed)


def _cuts(
    context: Context,
    heads: int,
    blocks: int,
    widths: tuple[int, ...],
    programs_per_sm: tuple[int, ...] = PROGRAMS_PER_SM,
) -> Iterator[tuple[int, int]]:
    """(blocks at once, steps of a program): how many programs share a head's blocks; the kernels leave no rest."""
    multiprocessors = 2
    if context.device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(context.device).multi_processor_count
    found = set()
    for width in widths:
        for programs in programs_per_sm:
            steps = 1
            while blocks % (2 * steps * width) == 0 and heads * blocks > 2 * steps * width * multiprocessors * programs:
                steps *= 2
            if blocks % (steps * width) == 0:
                found.add((width, steps))
    yield from sorted(found)
