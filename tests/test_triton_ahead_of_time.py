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
from sass.launches import all_specialisations
from sass.main import TARGETS, measure, results_file
recorded = json.loads(results_file().read_text())
names = ("attention small", "append a token base", "prefill quantize base", "dequantize base")
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
    kinds = [sass("counts").kind_of(instruction.name) for instruction in program.body()]
    assert sum(instruction.base != "NOP" for instruction in program.instructions) == 7
    assert kinds == ["global", "integer", "conversion", "matrix", "other"]


def test_a_regression_is_found(sass):
    regressions = sass("main").regressions
    before = {"kernel": {"registers": 100, "spills": 0, "all": 2000.0, "share at 700 ns": 0.55}}
    now = {"registers": 110, "spills": 0, "all": 2199.0, "share at 700 ns": 0.51}
    assert regressions({"kernel": now}, before) == []
    worse = {"registers": 111, "spills": 4, "all": 2300.0, "share at 700 ns": 0.49}
    assert len(regressions({"kernel": worse}, before)) == 4
    assert "not recorded" in regressions({"new": {}}, before)[0]


def test_programs_without_room_wait_for_the_first_to_end(sass):
    assert sass("calls").schedule([3.0] * 4, room=4) == 3.0
    assert sass("calls").schedule([3.0, 1.0, 3.0], room=2) == 4.0


CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from sass.calls import DecodeAttention
attention = DecodeAttention("small", 700, {})
short, long = attention.call(4096), attention.call(16384)
assert short.before > 0 and short.after > 0 and short.combine > 0, short
assert long.loop > 2 * short.loop, (short, long)
assert 0.5 < long.before / short.before < 2, (short, long)
assert 0 < long.floor < long.total, long
"""


def test_the_loop_of_decode_attention_grows_with_the_context():
    done = run_compiler("-c", CALLS, str(SCRIPT.parent))
    assert done.returncode == 0, done.stderr
