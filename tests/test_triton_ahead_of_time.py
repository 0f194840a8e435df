"""The Triton kernels compile for every target without a GPU, spill nothing and stay within their recorded figures.

In a process of its own: this one may run Triton's interpreter, in which nothing is compiled.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "sass.py"

COMPILE_EVERYWHERE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import sass
recorded = json.loads(sass.results_file().read_text())
names = ("attention small", "append a token base", "prefill quantize base", "dequantize base")
for item in (item for item in sass.all_specialisations() if item.name in names):
    for name, target in sass.TARGETS.items():
        if name != "90":
            numbers = sass.measure(item, target)
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


def test_the_h100_kernel_needs_no_more_instructions_than_recorded():
    done = run_compiler(str(SCRIPT), "--quick", "--only", "attention base", "--target", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing grew by more than 10 %" in done.stdout


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


def load_script():
    spec = importlib.util.spec_from_file_location("sass_of_tests", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_instructions_of_the_inner_loop_are_counted_by_kind():
    sass = load_script()
    everything, loop = sass.parse(LISTING)
    assert len(everything) == 7
    assert [sass.kind_of(name) for name in loop] == ["global", "integer", "conversion", "matrix", "other"]


def test_a_regression_is_found():
    sass = load_script()
    before = {"kernel": {"registers": 100, "spills": 0, "all": 2000.0}}
    assert sass.regressions({"kernel": {"registers": 110, "spills": 0, "all": 2199.0}}, before) == []
    assert len(sass.regressions({"kernel": {"registers": 111, "spills": 4, "all": 2300.0}}, before)) == 3
    assert "not recorded" in sass.regressions({"new": {}}, before)[0]
