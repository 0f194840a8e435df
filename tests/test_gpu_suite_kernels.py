"""The suite's kernels without a GPU: they compile for one and spill nothing, and nothing compiles while it measures."""

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


SPECIALISATIONS = """
import sys
sys.path += [sys.argv[1], sys.argv[2]]
import torch
from gpu_suite import decode
from innerq_compile.config import InnerQConfig
from innerq_compile.kernels.triton import decode_attention as launcher
from innerq_compile.layout import allocate_state

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


def call(case, preset):
    config, capacity = InnerQConfig.from_preset(preset), case.context + decode.SPARE
    shape = {"batch_size": case.batch, "num_kv_heads": case.heads, "head_dim": case.head_dim, "capacity": capacity}
    state = allocate_state(config, **shape, dtype=torch.bfloat16, device="meta")
    query = torch.empty(case.batch, case.q_heads, 1, case.head_dim, dtype=torch.bfloat16, device="meta")
    launcher.decode_attention(query, *state, None, 0.1, capacity, config.spec, launch=record)


for preset in decode.PRESETS:
    for shape in (decode.GQA, decode.MHA):
        call(decode.Case(*shape, *decode.WARMED), preset)
warmed = set(kernels)
for case in decode.CASES:
    for preset in decode.PRESETS:
        call(case, preset)
assert kernels == warmed, kernels - warmed
print(len(kernels))
"""


def test_every_measured_case_runs_the_kernels_that_were_compiled_ahead(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-P", "-c", SPECIALISATIONS, str(SUITE.parent), str(SUITE.parent.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == 2 * 4 + 2, "a kernel for each preset and number of query heads, and two merges"
