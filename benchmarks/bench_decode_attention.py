"""Decode attention of one layer on the CPU: time, bandwidth and error, ours against the ways a user has today.

    .venv/bin/python benchmarks/bench_decode_attention.py            # everything, some minutes
    .venv/bin/python benchmarks/bench_decode_attention.py --contexts 4096 --shapes 32/8/64
    chrt -f 5 .venv/bin/python benchmarks/bench_decode_attention.py   # on a machine that others use as well

Correctness is checked first. Then all contenders of a case take turns in one loop, each call on the next of several
copies of its cache, so that nothing is left of a copy in the caches when its turn comes again (the section "rotation"
of the result shows from which footprint on a read stays slow). A streaming read of exactly our packed bytes takes turns
with the rest: its bandwidth is the ceiling. Times are medians. Writes benchmarks/results/<cpu>.json.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before torch starts its threads: unbound, two of them can land on one core of a busy machine.
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
from tabulate import tabulate
from torch.nn.functional import scaled_dot_product_attention as sdpa

from innerq_compile import ops, reference
from innerq_compile.config import InnerQConfig
from innerq_compile.kernels import cpu
from innerq_compile.kernels.cpu import build
from innerq_compile.layout import LayerState, allocate_state

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


def interleaved(contenders: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call; every round calls each contender in turn, with a new number each time.

    A call on other data goes before each timed one: code warm, data cold. Without it whoever follows a long matrix
    product pays for fetching the interpreter's own code again (50 to 300 us here), which says nothing about attention.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 2):
        for name, call in contenders.items():
            call(2 * index)
            begin = time.perf_counter()
            call(2 * index + 1)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


def measure_rotation(read: Read, rounds: int) -> list[dict[str, float]]:
    """Bandwidth of reading 16 MiB pieces in turn, by the footprint that the turn goes through."""
    piece, rows = 2**24, []
    for footprint in (32, 128, 256, 512, 1024):
        memory = torch.ones(footprint * 2**20 // piece, piece, dtype=torch.uint8)
        count = max(rounds, 2 * len(memory))
        seconds = interleaved({"read": lambda i, memory=memory: read((memory[i % len(memory)],))}, count)["read"]
        rows.append({"footprint_mib": footprint, "gb_per_s": piece / seconds / 1e9})
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


def copies(tensors: tuple[torch.Tensor, ...], rotate_bytes: int) -> list[tuple[torch.Tensor, ...]]:
    """As many copies as it takes to fill ``rotate_bytes``, two at least."""
    count = max(2, -(-rotate_bytes // bytes_of(tensors)))
    return [tensors, *(tuple(x.clone() for x in tensors) for _ in range(count - 1))]


def rivals(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotate: int) -> dict[str, Callable]:
    """Attention over a 16- or 32-bit cache, as transformers calls it and as well as torch can do it."""
    q_heads, heads = query.shape[1], key.shape[1]
    group = q_heads // heads
    found: dict[str, Callable] = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        q = query.to(dtype)
        caches = copies((key.to(dtype), value.to(dtype)), rotate)
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool)

        def dynamic(i: int, q: torch.Tensor = q, caches: list = caches) -> torch.Tensor:
            k, v = (x.repeat_interleave(group, 1) for x in caches[i % len(caches)])
            return sdpa(q, k, v)

        def folded(i: int, q: torch.Tensor = q, caches: list = caches) -> torch.Tensor:
            k, v = caches[i % len(caches)]
            return sdpa(q.view(1, heads, group, -1), k, v).view_as(q)

        def static(i: int, q: torch.Tensor = q, caches: list = caches, mask: torch.Tensor = mask) -> torch.Tensor:
            k, v = caches[i % len(caches)]
            return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

        found |= {f"sdpa repeat_kv {name}": dynamic, f"sdpa folded {name}": folded, f"sdpa static {name}": static}
    return found | quantized_caches(query, key, value)


def quantized_caches(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Callable]:
    """transformers' QuantizedCache with the back ends that are installed: one dequantized layer, then SDPA."""
    from transformers import LlamaConfig, QuantizedCache

    found: dict[str, Callable] = {}
    group, heads = query.shape[1] // key.shape[1], key.shape[1]
    model = LlamaConfig(num_hidden_layers=1, num_attention_heads=query.shape[1], num_key_value_heads=heads)
    for backend, package in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        if not importlib.util.find_spec(package.split(".")[0]) or not importlib.util.find_spec(package):
            continue
        cache = QuantizedCache(backend, model, nbits=4, q_group_size=64, residual_length=10**6)
        cache.update(key.bfloat16(), value.bfloat16(), 0)
        one = key[:, :, :1].bfloat16()

        def attend(i: int, cache: QuantizedCache = cache, one: torch.Tensor = one) -> torch.Tensor:
            k, v = (x.repeat_interleave(group, 1) for x in cache.update(one, one, 0))
            return sdpa(query.bfloat16(), k, v)

        found[f"QuantizedCache {backend} 4 bit"] = attend
    return found


def bench_case(shape: str, context: int, args: argparse.Namespace, read: Read) -> list[dict[str, object]]:
    """All contenders at one shape and context: rows of milliseconds, bytes and shares."""
    q_heads, heads, head_dim = map(int, shape.split("/"))
    key, value = (torch.randn(1, heads, context, head_dim, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(1, q_heads, 1, head_dim, dtype=torch.bfloat16)
    rotate, sizes = args.rotate_mib * 2**20, {}
    contenders: dict[str, Callable[[int], object]] = {}
    for preset in PRESETS:
        config = InnerQConfig.from_preset(preset)
        states = [LayerState(*x) for x in copies(tuple(new_cache(config, key, value)), rotate)]
        sizes[preset] = bytes_of(states[0])

        def ours(i: int, states: list = states, spec: str = config.spec) -> torch.Tensor:
            return ops.decode_attention(query, *states[i % len(states)], None, head_dim**-0.5, context + 64, spec)

        # Half a turn away from ours, so that neither finds what the other has just read.
        contenders[preset] = ours
        contenders[f"read {preset}"] = lambda i, s=states: read(s[(i + len(s) // 2) % len(s)])
    if context <= args.rivals_up_to:
        contenders |= rivals(query, key, value, rotate)
    medians = interleaved(contenders, args.rounds)
    rows: list[dict[str, object]] = []
    for name, seconds in medians.items():
        row: dict[str, object] = {"shape": shape, "context": context, "contender": name, "ms": seconds * 1e3}
        if name in sizes:
            row |= {
                "mib": sizes[name] / 2**20,
                "gb_per_s": sizes[name] / seconds / 1e9,
                "share_of_read": medians[f"read {name}"] / seconds,
            }
        rows.append(row)
    others = [row["ms"] for row in rows if row["contender"] not in sizes and "read" not in str(row["contender"])]
    for row in rows:
        if row["contender"] in sizes and others:
            row["times_faster_than_best_rival"] = min(others) / row["ms"]
    return rows


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
        rows.append(
            {
                "shape": shape,
                "context": context,
                "preset": preset,
                "append_us": statistics.median(steps) * 1e6,
                "prefill_gb_per_s_per_core": 2 * key.numel() * 2 / min(prefills) / 1e9 / torch.get_num_threads(),
            }
        )
    return rows


def cpu_name() -> str:
    """The CPU's marketing name, or its architecture."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return match.group(1) if match else platform.processor() or platform.machine()


def plot(result: dict, path: Path) -> None:
    """Time per step against context, log-log, with the ceiling that memory sets for the 4-bit cache."""
    import matplotlib.pyplot as plt

    shapes = sorted({row["shape"] for row in result["attention"]})
    figure, axes = plt.subplots(1, len(shapes), figsize=(6 * len(shapes), 4.5), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        rows = [row for row in result["attention"] if row["shape"] == shape]
        for name in dict.fromkeys(row["contender"] for row in rows):
            if name.startswith("read") and name != "read int4":
                continue
            points = [(row["context"], row["ms"]) for row in rows if row["contender"] == name]
            label = "memory ceiling, int4" if name == "read int4" else name
            axis.loglog(*zip(*points, strict=True), "k--" if name == "read int4" else "o-", label=label, markersize=3)
        axis.set(title=f"Hq/Hkv/D {shape}", xlabel="tokens in the cache", ylabel="ms per step and layer")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Checks, measures, prints tables and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="Hq/Hkv/D")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384, 32768, 131072])
    parser.add_argument("--rivals-up-to", type=int, default=32768, help="longest context of the 16-bit contenders")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rotate-mib", type=int, default=512, help="footprint of the copies of one cache")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<cpu>.json")
    parser.add_argument("--plot", type=Path, help="also draw time against context (needs matplotlib)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cpu.register()
    if cpu.unavailable():
        raise SystemExit(f"the CPU kernels cannot be built: {cpu.unavailable()}")
    read = load_stream_read()

    result: dict[str, object] = {
        "cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__, "rounds": args.rounds,
        "rotate_mib": args.rotate_mib, "errors": [row for shape in args.shapes for row in check(shape)],
    }  # fmt: skip
    print(tabulate(result["errors"], headers="keys", floatfmt=".1e"), end="\n\n")
    result["rotation"] = measure_rotation(read, args.rounds)
    print(tabulate(result["rotation"], headers="keys", floatfmt=".1f"), end="\n\n")
    attention: list[dict[str, object]] = []
    for shape in args.shapes:
        for context in args.contexts:
            rows = bench_case(shape, context, args, read)
            print(tabulate(rows, headers="keys", floatfmt=".2f"), end="\n\n", flush=True)
            attention += rows
    result["attention"] = attention
    result["append"] = [row for shape in args.shapes for row in bench_append(shape, 16384, args.rounds)]
    print(tabulate(result["append"], headers="keys", floatfmt=".2f"))
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower().replace("(r)", "")).strip("-")
    output = args.output or Path(__file__).parent / "results" / f"{slug}-{args.threads}-threads.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
