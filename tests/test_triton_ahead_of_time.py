"""The Triton kernels compile for every target without a GPU, spill nothing and stay within their recorded figures.

In a process of its own: this one may run Triton's interpreter, in which nothing is compiled.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "sass"

COMPILE_EVERYWHERE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from gpu.machine import read_kernel
from sass.launches import Specialisation, all_specialisations
from sass.__main__ import TARGETS, measure, results_file
recorded = json.loads(results_file().read_text())
names = ("attention small", "append a token base", "prefill quantize base", "dequantize base")
x = torch.zeros(4096, dtype=torch.int32)
arguments = dict(x_ptr=x, out_ptr=x, count=9, steps=9, BLOCK=4096)
reading = Specialisation("read", read_kernel, arguments, {"num_warps": 8}, 0, 0)
assert measure(reading, TARGETS["90"])["spills"] == 0
for item in (item for item in all_specialisations() if item.name in names):
    for name, target in TARGETS.items():
        if name != "90":
            numbers = measure(item, target)
            # Triton 3.6 spills on gfx942; nothing else does.
            assert numbers["spills"] <= recorded[f"{name} | {item.name}"]["spills"], (name, item.name, numbers)
"""


def run_compiler(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-P", *command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.long
def test_kernels_compile_for_every_target_without_spills():
    done = run_compiler("-c", COMPILE_EVERYWHERE, str(SCRIPT.parent))
    assert done.returncode == 0, done.stderr


def test_the_h100_kernel_is_as_good_as_recorded():
    done = run_compiler(str(SCRIPT), "--quick", "--only", "attention base", "--target", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing got worse by more than 10 %" in done.stdout


LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.64 R2, [R4.64] ;
        /*0020*/              @!P0 LOP3.LUT R5, R2, 0x3, RZ, 0xc0, !PT ;
        /*0030*/                   HADD2.F32 R6, -RZ, R2.H0_H0 ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   NOP ;
        /*0070*/                   EXIT ;
"""


@pytest.fixture
def sass():
    """Imports a module of the package, which is not installed."""
    sys.path.append(str(SCRIPT.parent))
    yield lambda name: importlib.import_module(f"sass.{name}")
    sys.path.remove(str(SCRIPT.parent))


def test_instructions_of_the_inner_loop_are_counted_by_kind(sass):
    program = sass("listing").parse(LISTING)
    kinds = [sass("listing").kind_of(instruction.name) for instruction in program.counted()]
    assert sum(instruction.base != "NOP" for instruction in program.instructions) == 7
    assert kinds == ["global", "integer", "conversion", "matrix", "other"]


def test_a_regression_is_found(sass):
    regressions = sass("__main__").regressions
    before = {"kernel": {"registers": 100, "spills": 0, "all": 2000.0, "share": 0.55}}
    now = {"registers": 110, "spills": 0, "all": 2199.0, "share": 0.51}
    assert regressions({"kernel": now}, before) == []
    worse = {"registers": 111, "spills": 4, "all": 2300.0, "share": 0.49}
    assert len(regressions({"kernel": worse}, before)) == 4
    assert "not recorded" in regressions({"new": {}}, before)[0]


BRANCHES = """
        /*0000*/              @P0 BRA `(.L_x_1) ;
        /*0010*/                   MOV R1, R2 ;
        /*0020*/                   CALL.REL.NOINC `($division) ;
        /*0030*/                   EXIT ;
.L_x_1:
        /*0040*/                   MOV R5, R6 ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2) ;
"""


def test_the_longest_way_through_a_program_calls_no_slow_division(sass):
    program = sass("listing").parse(BRANCHES)
    assert [each.base for each in program.longest_way()] == ["BRA", "MOV", "EXIT"]


def test_a_share_is_what_the_scarcest_rate_leaves(sass):
    listing = sass("listing")
    assert listing.share({"all": 1.0}, 1.0) == {"share": round(3.0 / 3.35, 3), "limit": "memory"}
    numbers = {"integer": 64e3, "all": 64e3}  # a lane operation per clock and code
    assert listing.share(numbers, 1.0) == {"share": round(listing.CLOCKS / 3.35e12, 3), "limit": "integer"}


SPECIALISATIONS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from gpu import attention
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.kernels.triton import decode_attention as launcher
from innerq_compile.numerics.layout import allocate_state

launcher._num_processors = lambda device: 132
kernels = set()


def record(kernel, grid, *args, **options):
    found = [kernel.__name__]
    for parameter, value in zip(kernel.params, [*args, *(options[p.name] for p in kernel.params[len(args):])]):
        if parameter.is_constexpr:
            found.append(value)
        elif isinstance(value, torch.Tensor):
            found.append(value.dtype)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            found.append((value == 1, value % 16 == 0))
    kernels.add(tuple(found))


for preset in attention.PRESETS:
    config = InnerQConfig.from_preset(preset)
    for part, (q_heads, heads, head_dim) in attention.SHAPES.items():
        for batch, contexts in attention.CASES[part]:
            for context in contexts:
                shape = {"batch_size": batch, "num_kv_heads": heads, "head_dim": head_dim, "capacity": context + 64}
                state = allocate_state(config, **shape, dtype=torch.bfloat16, device="meta")
                query = torch.empty(batch, q_heads, 1, head_dim, dtype=torch.bfloat16, device="meta")
                launcher.decode_attention(query, *state, None, 0.1, context + 64, config.spec, launch=record)
print(len(kernels))
"""


def test_no_batch_or_context_compiles_another_attention_kernel():
    done = run_compiler("-c", SPECIALISATIONS, str(SCRIPT.parent))
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == 2 * 4 + 2, "a kernel for each preset and number of query heads, and two merges"
