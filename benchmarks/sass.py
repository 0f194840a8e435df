"""Compiles the Triton kernels ahead of time, without a GPU, and counts their instructions.

    python benchmarks/sass.py            compares with the recorded figures; fails if one grew by more than 10 %
    python benchmarks/sass.py --record   records them
    python benchmarks/sass.py --only base --target 90

The launchers say what is compiled: they run on CPU tensors with a recorder in place of a launch, so the signature,
the constants and the options are those of a real call. Per 1000 codes a kernel's *lane operations* are counted:
instructions of the innermost loop x 32 lanes x warps / codes of an iteration; without a loop, of the whole program,
also of branches that one run does not take. On an H100 the four kinds of limits follow from that (``RATES``). On AMD
only registers and spills are read.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Triton 3.10 will change this default; the kernels are meant to be compiled with fused multiply-add.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from innerq_compile.config import InnerQConfig
from innerq_compile.kernels.triton import append_kv, decode_attention, dequantize_kv
from innerq_compile.layout import LayerState, allocate_state

RESULTS = Path(__file__).resolve().parent / "results"
TOOLS = Path(triton.__file__).resolve().parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOLERANCE = 1.10

HEADS, CAPACITY = 8, 4096

CLOCKS = 132 * 1.755e9
RATES = {"integer": 64 * CLOCKS, "float": 128 * CLOCKS, "all": 128 * CLOCKS, "shared": 32 * CLOCKS, "memory": 3.35e12}
"""Lane operations per second of an H100 SXM (memory: bytes): 132 multiprocessors at 1.755 GHz."""

KINDS = {
    "matrix": r"(HMMA|IMMA|QGMMA|HGMMA|IGMMA)",
    "shared": r"(LDS|STS|LDSM|STSM|SHFL|LDGSTS|ATOMS)\b",
    "global": r"(LDG|STG|LDL|STL|ATOMG|RED)\b",
    "conversion": r"(F2F|F2FP|I2F|I2FP|F2I|HADD2\.F32)",
    "float": r"(FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|FCHK|MUFU|HADD2|HFMA2|HMUL2|HMNMX2|FSET)",
    "integer": r"(LOP3|SHF|IADD3|IMAD|ISETP|VIADD|VIMNMX|LEA|PRMT|SEL|BFE|SGXT|IABS|IMNMX|POPC|PLOP3|I2I|BMSK|FLO)",
}
"""Kind of instruction by the beginning of its name, first match first. HADD2.F32 turns float16 into float32."""


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """One launch of a kernel: what it is called with, and how many codes an iteration (or the program) handles."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    codes: int
    bytes_per_code: float


def recorded_launches(call: Any) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Kernels, arguments and options that a launcher would launch."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    call(lambda kernel, grid, *args, **options: launches.append((kernel, args, options)))
    return launches


def empty_cache(head_dim: int = 128, **settings: Any) -> tuple[InnerQConfig, LayerState]:
    """Settings of a preset and a cache of a bf16 model with them."""
    config = InnerQConfig.from_preset(**settings)
    shape = {"batch_size": 1, "num_kv_heads": HEADS, "head_dim": head_dim, "capacity": CAPACITY}
    return config, allocate_state(config, **shape, dtype=torch.bfloat16, device="cpu")


def attention(
    name: str, q_per_kv: int = 4, q_len: int = 1, head_dim: int = 128, **settings: Any
) -> list[Specialisation]:
    """decode_attention's two kernels for a bf16 model; settings of the cache, or ``mask=True`` or ``exact=True``."""
    mask, exact = settings.pop("mask", False), settings.pop("exact", False)
    config, state = empty_cache(head_dim, **settings)
    query = torch.empty(1, HEADS * q_per_kv, q_len, head_dim, dtype=torch.bfloat16)
    masked = torch.ones(1, 1, q_len, CAPACITY, dtype=torch.bool) if mask else None
    launches = recorded_launches(
        lambda launch: decode_attention.decode_attention(
            query, *state, masked, 0.1, CAPACITY, config.spec, exact, launch=launch
        )
    )
    found = []
    for (kernel, args, options), part in zip(launches, ("", " combine"), strict=True):
        codes = 2 * 32 * head_dim * options["NB"] if not part else 0
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        chosen = {key: arguments.pop(key) for key in ("num_warps", "num_stages") if key in arguments}
        if not part:
            arguments["WIDEN"] = exact
        found.append(Specialisation(name + part, kernel, arguments, chosen, codes, config.bits_per_number / 8))
    return found


APPENDS = {
    "append_step_kernel": "append a token",
    "key_range_kernel": "prefill range",
    "key_norm_kernel": "prefill norm",
    "quantize_kernel": "prefill quantize",
    "window_kernel": "prefill window",
}


def appending(preset: str) -> list[Specialisation]:
    """append_kv's kernels, for a token and for a prefill."""
    config, state = empty_cache(preset=preset)
    found = []
    for num_new in (1, 1024):
        new = torch.empty(1, HEADS, num_new, 128, dtype=torch.bfloat16)
        call = functools.partial(append_kv.append_kv, new, new, *state, CAPACITY, config.spec)
        for kernel, args, options in recorded_launches(lambda launch, call=call: call(launch=launch)):
            codes = 2 * 32 * options["SLICE"] if kernel is append_kv.quantize_kernel else 0
            found.append(whole_program(f"{APPENDS[kernel.__name__]} {preset}", kernel, args, options, codes, config))
    return found


def dequantizing(preset: str) -> Specialisation:
    """dequantize_kv's kernel."""
    config, state = empty_cache(preset=preset)
    ((kernel, args, options),) = recorded_launches(
        lambda launch: dequantize_kv.dequantize_kv(*state, CAPACITY, config.spec, launch=launch)
    )
    return whole_program(f"dequantize {preset}", kernel, args, options, 2 * 32 * options["SLICE"], config)


def whole_program(
    name: str, kernel: Any, args: tuple[Any, ...], options: dict[str, Any], codes: int, config: InnerQConfig
) -> Specialisation:
    """A kernel that turns bf16 numbers into codes or codes into numbers, compiled as ``launch.run`` has it compiled."""
    arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    chosen = {"num_warps": 4, "enable_fp_fusion": False}
    return Specialisation(name, kernel, arguments, chosen, codes, config.bits_per_number / 8 + 2)


def all_specialisations() -> list[Specialisation]:
    """Everything that the table shows."""
    base = attention("attention base", preset="base")
    return [
        *base,
        *(attention(f"attention {preset}", preset=preset)[0] for preset in ("small", "hybrid", "int4", "int8")),
        attention("attention base 1 head", q_per_kv=1, preset="base")[0],
        attention("attention base 16 heads", q_per_kv=16, preset="base")[0],
        attention("attention base D=64", head_dim=64, preset="base")[0],
        attention("attention base D=256", head_dim=256, preset="base")[0],
        attention("attention base mask", mask=True, preset="base")[0],
        attention("attention base exact", exact=True, preset="base")[0],
        *appending("base"),
        *(item for item in appending("hybrid") if item.codes or item.name.startswith("append")),
        *(dequantizing(preset) for preset in ("base", "hybrid")),
    ]


EVERYWHERE = ("attention base", "attention base combine", "attention small", "dequantize base") + tuple(
    f"{name} base" for name in APPENDS.values()
)
"""What is compiled for every target; the others are compiled for an H100 only, to keep the run short."""


def source_of(item: Specialisation, target: GPUTarget) -> ASTSource:
    """What Triton's own launcher would compile for these arguments on that device."""
    signature, constants, attributes = {}, {}, {}
    names = item.kernel.arg_names
    arguments = dict(item.arguments)
    if "ASM" in names:
        arguments["ASM"] = target.backend == "cuda"
    for index, name in enumerate(names):
        value, parameter = arguments[name], item.kernel.params[index]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int16": "i16"}.get(
                str(value.dtype)[6:], str(value.dtype)[6:].replace("uint", "u").replace("int", "i")
            )
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and special:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=item.kernel, signature=signature, constexprs=constants, attrs=attributes)


def measure(item: Specialisation, target: GPUTarget) -> dict[str, float]:
    """Registers, spills, shared bytes and, on NVIDIA, lane operations per 1000 codes of each kind."""
    compiled = triton.compile(source_of(item, target), target=target, options=item.options)
    if target.backend == "hip":
        numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        return {
            "registers": int(numbers["vgpr_count"]),
            "spills": int(numbers["vgpr_spill_count"]),
            "shared bytes": compiled.metadata.shared,
        }
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        listing = _run("nvdisasm", "-c", str(cubin))
    stack, registers = re.search(r"STACK:(\d+)", usage), re.search(r"REG:(\d+)", usage)
    assert stack and registers, usage
    instructions, loop = parse(listing)
    numbers = {
        "registers": int(registers[1]),
        "spills": int(stack[1]),
        "shared bytes": compiled.metadata.shared,
        "instructions": len(instructions),
    }
    if item.codes:
        kinds = collections.Counter(kind_of(name) for name in loop)
        per_1000 = 1000 * 32 * item.options["num_warps"] / item.codes
        numbers |= {kind: round(count * per_1000, 1) for kind, count in kinds.items()}
        numbers["all"] = round(len(loop) * per_1000, 1)
    return numbers


def parse(listing: str) -> tuple[list[str], list[str]]:
    """Instructions of a disassembly, and those of its longest innermost loop."""
    labels: dict[str, int] = {}
    names: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line):
            names.append(instruction[1])
            jump = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if names[-1].startswith("BRA") and jump and jump[1] in labels and labels[jump[1]] < len(names) - 1:
                loops.append((labels[jump[1]], len(names)))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    first, last = max(inner, key=lambda ends: ends[1] - ends[0], default=(0, len(names)))
    return [name for name in names if name != "NOP"], [name for name in names[first:last] if name != "NOP"]


def kind_of(name: str) -> str:
    """Kind of an instruction; "other" are branches, barriers and what a warp does once, in its uniform unit."""
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "other")


def bounds(numbers: dict[str, float], item: Specialisation) -> dict[str, float]:
    """Nanoseconds per million codes that each limit of an H100 allows at best."""
    at_least = {kind: numbers.get(kind, 0) / RATES[kind] for kind in ("integer", "float", "all", "shared")}
    at_least["memory"] = 1000 * item.bytes_per_code / RATES["memory"]
    return {kind: seconds * 1e12 for kind, seconds in at_least.items()}


def regressions(now: dict[str, dict[str, float]], recorded: dict[str, dict[str, float]]) -> list[str]:
    """Figures that grew by more than 10 %, spills that appeared, and kernels nobody recorded."""
    found = []
    for name, numbers in now.items():
        before = recorded.get(name)
        if before is None:
            found.append(f"{name}: not recorded, run with --record")
            continue
        for key in ("registers", "spills", "shared bytes", "instructions", "integer", "all"):
            if numbers.get(key, 0) > before.get(key, 0) * TOLERANCE:
                found.append(f"{name}: {key} {before.get(key, 0)} -> {numbers[key]}")
    return found


def table(measured: dict[str, dict[str, float]], items: dict[str, Specialisation]) -> str:
    """One row per kernel and target, lane operations per 1000 codes, and which limit of an H100 comes first."""
    columns = ["registers", "spills", "shared bytes"]
    kinds = ["integer", "float", "conversion", "shared", "matrix", "all"]
    rows = []
    for name, numbers in measured.items():
        item = items[name.split(" | ")[1]]
        limits = bounds(numbers, item) if "all" in numbers else {}
        slowest = max(limits, key=limits.__getitem__, default="")
        rest = f"{slowest} ({limits['memory'] / limits[slowest]:.0%} of memory)" if slowest else ""
        rows.append([name, *(numbers.get(key, "") for key in [*columns, *kinds]), rest])
    return tabulate(rows, headers=["kernel", *columns, *kinds, "H100 limit"])


def results_file() -> Path:
    """Figures belong to a Triton version: 3.6 and 3.9 generate different code."""
    return RESULTS / f"sass-triton-{'.'.join(triton.__version__.split('.')[:2])}.json"


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Prints the table; 1 when something regressed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the figures instead of comparing")
    parser.add_argument("--quick", action="store_true", help="only what is compiled for every target")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    options = parser.parse_args()
    items = {item.name: item for item in all_specialisations() if options.only in item.name}
    if options.quick:
        items = {name: item for name, item in items.items() if name in EVERYWHERE}
    measured = {}
    for target in options.target or TARGETS:
        for name, item in items.items():
            if target != "90" and name not in EVERYWHERE:
                continue
            measured[f"{target} | {name}"] = measure(item, TARGETS[target])
            print(f"{target} | {name}", file=sys.stderr, flush=True)
    print(table(measured, items))
    path = results_file()
    recorded = json.loads(path.read_text()) if path.exists() else {}
    if options.record:
        path.write_text(json.dumps({**recorded, **measured}, indent=1) + "\n")
        return 0
    found = regressions(measured, recorded)
    print("\n".join(["", *found]) if found else f"\nnothing grew by more than 10 % over {path.name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
