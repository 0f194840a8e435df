"""Decode attention of one layer on the CPU: time, bandwidth and error, ours against the ways a user has today.

    .venv/bin/python benchmarks/bench_decode_attention.py            # ours against torch, some minutes
    .venv/bin/python benchmarks/bench_decode_attention.py --contexts 4096 --shapes 32/8/64
    make rivals                                                      # against other libraries as well
    chrt -f 5 .venv/bin/python benchmarks/bench_decode_attention.py   # on a machine that others use as well

Correctness is checked first. Then all contenders of a case take turns in one loop. Before a turn a buffer larger than
the last-level cache is read (the section "rotation" of the result shows from which footprint on a read stays slow); a
turn attends over one copy of the cache, so that code is warm, and is timed over another, whose bytes are cold. A
streaming read of exactly our packed bytes takes turns with the rest: its bandwidth is the ceiling. Times are medians.
Others' libraries run in processes of their own (benchmarks/rivals). Writes benchmarks/results/<cpu>.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before torch starts its threads: unbound, two of them can land on one core of a busy machine.
os.environ.setdefault("OMP_PROC_BIND", "true")
# Binding leaves the main thread one CPU, and whatever it starts: the rivals' processes want these back.
os.environ["RIVALS_CPUS"] = " ".join(map(str, getattr(os, "sched_getaffinity", lambda _: ())(0)))

import torch
from record import RESULTS, machine, slug
from rivals import COPIES, GROUPS, Case
from rivals.processes import started
from tabulate import tabulate

from innerq_compile import ops
from innerq_compile.kernels import cpu
from innerq_compile.kernels.cpu import build
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import LayerState, allocate_state

PRESETS = ("int4", "base", "small", "hybrid", "int8")
SHAPES = ("32/8/64", "32/8/128")

STREAM_SOURCE = """
#include <cstdint>
typedef int64_t Vector __attribute__((vector_size(64), aligned(1), may_alias));
extern "C" int64_t stream_read(const int64_t* addresses, const int64_t* sizes, int count, int threads) {
    int64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total)
    for (int i = 0; i < threads; i++) {
        Vector a = {}, b = {}, c = {}, d = {};
        for (int j = 0; j < count; j++) {
            const char* p = (const char*)addresses[j];
            const char *at = p + sizes[j] * i / threads / 64 * 64, *end = p + sizes[j] * (i + 1) / threads / 64 * 64;
            for (; at + 256 <= end; at += 256) {
                for (int k = 0; k < 4; k++) __builtin_prefetch(at + 2048 + 64 * k);
                a += *(const Vector*)at, b += *(const Vector*)(at + 64);
                c += *(const Vector*)(at + 128), d += *(const Vector*)(at + 192);
            }
        }
        for (int k = 0; k < 8; k++) total += (a + b + c + d)[k];
    }
    return total;
}
"""

Read = Callable[[tuple[torch.Tensor, ...]], object]


def load_stream_read() -> Read:
    """A plain read of the bytes of some tensors on all threads, in C++: what one decode step of ours has to read."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stream.cpp", Path(folder) / "stream.so"
        source.write_text(STREAM_SOURCE)
        command = [*build.find_compiler(), "-O3", *build.NATIVE, "-fopenmp", "-shared", "-fPIC", source, "-o", library]
        subprocess.run(command, check=True)
        stream_read = ctypes.CDLL(str(library)).stream_read

    def read(tensors: tuple[torch.Tensor, ...]) -> None:
        array = ctypes.c_int64 * len(tensors)
        sizes = array(*(x.numel() * x.element_size() for x in tensors))
        stream_read(array(*(x.data_ptr() for x in tensors)), sizes, len(tensors), torch.get_num_threads())

    return read


def bytes_of(tensors: tuple[torch.Tensor, ...]) -> int:
    """Bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


def warm_then_timed(call: Callable[[int], object]) -> float:
    """Seconds of a call on the second copy, after one on the first.

    Without the first, whoever follows a long matrix product pays for fetching the interpreter's own code again (50 to
    300 us here), which says nothing about attention.
    """
    call(0)
    begin = time.perf_counter()
    call(1)
    return time.perf_counter() - begin


def interleaved(turns: dict[str, Callable[[], float]], rounds: int, flush: Callable[[], object]) -> dict[str, float]:
    """Median seconds; every round gives each contender a turn, on cold data.

    The pause lets threads that spin after their work, ours and the rivals', fall asleep.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, turn in turns.items():
            flush()
            time.sleep(0.02)
            times[name].append(turn())
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def measure_rotation(read: Read, rounds: int) -> list[dict[str, float]]:
    """Bandwidth of reading 16 MiB pieces in turn, by the footprint that the turn goes through."""
    piece, rows = 2**24, []
    for footprint in (32, 128, 256, 512, 1024):
        memory, times = torch.ones(footprint * 2**20 // piece, piece, dtype=torch.uint8), []
        for index in range(max(rounds, 2 * len(memory))):
            begin = time.perf_counter()
            read((memory[index % len(memory)],))
            times.append(time.perf_counter() - begin)
        rows.append({"footprint_mib": footprint, "gb_per_s": piece / statistics.median(times) / 1e9})
    return rows


def new_cache(config: InnerQConfig, key: torch.Tensor, value: torch.Tensor) -> LayerState:
    """A layer's buffers after a prefill of these keys and values, with room for 64 more tokens."""
    batch, heads, length, head_dim = key.shape
    state = allocate_state(
        config, batch_size=batch, num_kv_heads=heads, head_dim=head_dim, capacity=length + 64, dtype=key.dtype,
        device="cpu",
    )  # fmt: skip
    ops.append_kv(key, value, *state, length + 64, config.spec)
    return state


def check(shape: str) -> list[dict[str, object]]:
    """Errors against float64 attention over the same dequantized cache, N(0,1) data, 4096 tokens.

    Raises:
        SystemExit: One is over its limit; nothing is timed then.
    """
    q_heads, heads, head_dim = map(int, shape.split("/"))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, heads, 4096, head_dim, generator=generator) for _ in range(2))
    query = torch.randn(1, q_heads, 1, head_dim, generator=generator)
    rows = []
    for preset in PRESETS:
        config = InnerQConfig.from_preset(preset)
        state = new_cache(config, key, value)
        wanted = reference.decode_attention(query, state, None, head_dim**-0.5, config, 4160, torch.float64)
        row: dict[str, object] = {"shape": shape, "preset": preset}
        for name, exact, limit in (("integer", False, 1.5e-2), ("exact", True, 1e-5)):
            got = ops.decode_attention(query, *state, None, head_dim**-0.5, 4160, config.spec, exact)
            row[name] = float((got - wanted).norm() / wanted.norm())
            if not row[name] <= limit:
                raise SystemExit(f"{shape} {preset} {name}: relative error {row[name]:.2e} is over {limit}")
        rows.append(row)
    return rows


def bench_case(shape: str, context: int, args: argparse.Namespace, read: Read) -> dict[str, list[dict[str, object]]]:
    """All contenders at one shape and context: rows of milliseconds, bytes and shares; and what the rivals are.

    Errors, here and of the rivals, are against float64 attention over keys and values that nobody has rounded.
    """
    q_heads, heads, head_dim = map(int, shape.split("/"))
    inputs = Case(q_heads, heads, head_dim, context, args.threads)
    query, key, value = (torch.from_numpy(x).bfloat16() for x in inputs.data())
    groups = args.rivals if context <= args.rivals_up_to else []
    wanted = torch.from_numpy(inputs.attention()) if groups else None
    sizes: dict[str, int] = {}
    errors: dict[str, float] = {}
    turns: dict[str, Callable[[], float]] = {}
    for preset in PRESETS:
        config = InnerQConfig.from_preset(preset)
        states = [new_cache(config, key, value) for _ in range(COPIES)]
        sizes[preset] = bytes_of(states[0])

        def attend(i: int, states: list = states, spec: str = config.spec) -> torch.Tensor:
            return ops.decode_attention(query, *states[i], None, head_dim**-0.5, context + 64, spec)

        if wanted is not None:
            errors[preset] = float((attend(0) - wanted).norm() / wanted.norm())
        turns[preset] = lambda attend=attend: warm_then_timed(attend)
        turns[f"read {preset}"] = lambda states=states: warm_then_timed(lambda i: read(states[i]))
    cold = torch.ones(args.flush_mib * 2**20, dtype=torch.uint8)
    with started(groups, inputs) as (others, found):
        medians = interleaved(turns | others, args.rounds, lambda: read((cold,)))
    case = {"shape": shape, "context": context}
    rows: list[dict[str, object]] = []
    for name, seconds in medians.items():
        row: dict[str, object] = {**case, "contender": name, "ms": seconds * 1e3}
        if name in sizes:
            row |= {"mib": sizes[name] / 2**20, "gb_per_s": sizes[name] / seconds / 1e9}
            row |= {"share_of_read": medians[f"read {name}"] / seconds}
        if name in errors:
            row["error"] = errors[name]
        rows.append(row)
    return {"attention": rows, "rivals": [{**case, **row} for row in found]}


def bench_append(shape: str, context: int, rounds: int) -> list[dict[str, object]]:
    """Cost of a step's append (averaged over a flush period) and bandwidth of quantizing a prefill."""
    _, heads, head_dim = map(int, shape.split("/"))
    rows = []
    for preset in PRESETS:
        config = InnerQConfig.from_preset(preset)
        key, value = (torch.randn(1, heads, context, head_dim, dtype=torch.bfloat16) for _ in range(2))
        one, state, fresh = key[:, :, :1], new_cache(config, key, value), new_cache(config, key, value)
        steps, prefills = [], []
        for _ in range(rounds):
            fresh.counts.zero_()
            begin = time.perf_counter()
            ops.append_kv(key, value, *fresh, context + 64, config.spec)
            prefills.append(time.perf_counter() - begin)
            counts = state.counts.clone()
            begin = time.perf_counter()
            for _ in range(config.flush_tokens):
                ops.append_kv(one, one, *state, context + 64, config.spec)
            steps.append((time.perf_counter() - begin) / config.flush_tokens)
            state.counts.copy_(counts)
        row = {"shape": shape, "context": context, "preset": preset, "append_us": statistics.median(steps) * 1e6}
        speed = 2 * key.numel() * 2 / min(prefills) / 1e9 / torch.get_num_threads()
        rows.append(row | {"prefill_gb_per_s_per_core": speed})
    return rows


def merge(old: dict, new: dict) -> dict:
    """The new result with those rows of the old one whose shape and context it does not have.

    Raises:
        SystemExit: The old one comes from another machine, commit or setting.
    """
    for name in ("machine", "threads", "rounds", "flush_mib"):
        if old[name] != new[name]:
            raise SystemExit(f"cannot add to a result with another {name}: {old[name]}, now {new[name]}")
    merged = dict(new)
    for name in ("errors", "attention", "rivals", "append"):
        fresh = {(row["shape"], row.get("context")) for row in new[name]}
        merged[name] = [row for row in old[name] if (row["shape"], row.get("context")) not in fresh] + new[name]
        merged[name].sort(key=lambda row: (int(row["shape"].split("/")[-1]), row.get("context", 0)))
    return merged


def main() -> None:
    """Checks, measures, prints tables and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="Hq/Hkv/D")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384, 32768, 131072])
    parser.add_argument("--rivals", nargs="*", default=["torch"], choices=list(GROUPS), help="whom to measure as well")
    parser.add_argument("--rivals-up-to", type=int, default=32768, help="longest context of the rivals")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--flush-mib", type=int, default=512, help="bytes that are read before every turn")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<cpu>.json")
    parser.add_argument("--add", action="store_true", help="keep the other cases that the output file has")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if cpu.unavailable():
        raise SystemExit(f"the CPU kernels cannot be built: {cpu.unavailable()}")
    read = load_stream_read()

    result: dict[str, object] = {
        "machine": machine(), "threads": args.threads, "rounds": args.rounds, "flush_mib": args.flush_mib,
        "errors": [row for shape in args.shapes for row in check(shape)],
    }  # fmt: skip
    print(tabulate(result["errors"], headers="keys", floatfmt=".1e"), end="\n\n")
    result["rotation"] = measure_rotation(read, args.rounds)
    print(tabulate(result["rotation"], headers="keys", floatfmt=".1f"), end="\n\n")
    result |= {"attention": [], "rivals": []}
    for shape in args.shapes:
        for context in args.contexts:
            case = bench_case(shape, context, args, read)
            for name, rows in case.items():
                print(tabulate(rows, headers="keys", floatfmt=".3g"), end="\n\n", flush=True)
                result[name] += rows
    result["append"] = [row for shape in args.shapes for row in bench_append(shape, 16384, args.rounds)]
    print(tabulate(result["append"], headers="keys", floatfmt=".2f"))
    output = args.output or RESULTS / f"{slug()}-{args.threads}-threads.json"
    if args.add and output.exists():
        result = merge(json.loads(output.read_text()), result)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
