"""Compiles a launch for a target, on any machine, and disassembles it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from pathlib import Path

# Triton 3.10 will change this default; the kernels are meant to be compiled with fused multiply-add.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sass.launches import Specialisation
from sass.listing import Program, parse

TOOLS = Path(triton.__file__).resolve().parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled kernel: registers of a thread, bytes it spills, shared bytes of a program, and NVIDIA's code."""

    registers: int
    spills: int
    shared_bytes: int
    program: Program | None


def compile_for(item: Specialisation, target: GPUTarget) -> Compiled:
    """Compiles one launch; on AMD only registers and spills are read (the latter counted, not in bytes)."""
    compiled = triton.compile(source_of(item, target), target=target, options=item.options)
    if target.backend == "hip":
        numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        return Compiled(int(numbers["vgpr_count"]), int(numbers["vgpr_spill_count"]), compiled.metadata.shared, None)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        listing = _run("nvdisasm", "-c", str(cubin))
    stack, registers = re.search(r"STACK:(\d+)", usage), re.search(r"REG:(\d+)", usage)
    assert stack and registers, usage
    return Compiled(int(registers[1]), int(stack[1]), compiled.metadata.shared, parse(listing))


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
            signature[name] = "*" + {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "bool": "i1"}.get(
                str(value.dtype)[6:], str(value.dtype)[6:].replace("uint", "u").replace("int", "i")
            )
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and special:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=item.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
