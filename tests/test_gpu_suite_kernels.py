"""The suite's own Triton kernels compile for a GPU that is not here, without spilling a register."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SUITE = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_suite"

PROGRAM = """
import subprocess, sys, tempfile
from pathlib import Path
sys.path += [sys.argv[1], sys.argv[2]]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpu_suite import product_fp16, product_matrices, product_words, read_kernel

POINTERS = {"q": "*fp16", "p": "*fp16", "x": "*i32", "k": "*fp16", "v": "*fp16", "codes": "*u8", "scales": "*fp16",
            "zeros": "*fp16", "out": "*fp32"}
TILES = {"TILES": 4, "CENTER": 3.5}
WORDS = {**TILES, "ASM": True, "STEP": 2}
CASES = [
    (read_kernel.read_kernel, {"BLOCK": 4096}),
    (product_fp16.qk_fp16_kernel, {"D": 128, "BLOCK": 64}),
    (product_fp16.av_fp16_kernel, {"D": 128, "BLOCK": 64}),
    (product_words.qk_words_kernel, {**WORDS, "BITS": 3, "LAYOUT": 0}),
    (product_words.av_words_kernel, {**WORDS, "BITS": 2, "LAYOUT": 1}),
    (product_words.qk_words_kernel, {**WORDS, "BITS": 2, "LAYOUT": 2}),
    (product_matrices.qk_matrices_kernel, {**TILES, "BITS": 3, "LAYOUT": 0, "INT8": True, "P": 2, "QUERIES": 4}),
    (product_matrices.av_matrices_kernel, {**TILES, "BITS": 2, "LAYOUT": 2, "INT8": False, "P": 2, "QUERIES": 4}),
]
for kernel, constants in CASES:
    signature = {
        name: "constexpr" if name in constants else POINTERS[name[:-4]] if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    if kernel is read_kernel.read_kernel:
        signature["out_ptr"] = "*i32"
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    print(kernel.__name__, constants, usage.strip().splitlines()[-1])
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    root = SUITE.parent.parent
    command = [sys.executable, "-P", "-c", PROGRAM, str(SUITE.parent), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:
        assert "LOCAL:0" in line and "STACK:0" in line, line
