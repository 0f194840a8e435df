"""The PTX emulator on hand-written PTX, and a few launches of the Triton kernels as the code compiled for an H100.

The kernels' own tests run on compiled code where ``INNERQ_EMULATE`` names a compute capability (``make emulate``).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path.append(str(TESTS))

from ptx import grid  # noqa: E402
from ptx.machine import EmulationError  # noqa: E402
from ptx.parser import parse  # noqa: E402

HEADER = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	{body}
	ret;
}}
"""
"""%r1: thread, %rd3: address of its 32-bit word of the tensor."""


def execute(body, words, *, threads=32, shared=0, number=0, size=(1,), **machine):
    """Runs a body on one tensor of 32-bit words, which it changes; returns what was executed."""
    program = parse(HEADER.format(threads=threads, body=body))
    return grid.run(program, size, [words, number], shared, **machine)


def bits(*values):
    """32-bit words: floats as they are stored, integers modulo 2**32."""
    words = [np.float32(x).view(np.uint32) if isinstance(x, float) else x % 2**32 for x in values]
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


NAN, TINY = float("nan"), 1e-40
HALF_STEP = 1 + 2.0**-8  # of bfloat16 at 1: lies between 1 and 1 + 2**-7

RESULTS = [
    ("shl.b32 %r9, %r2, %r3;", (1, 31), 2**31),
    ("shl.b32 %r9, %r2, %r3;", (1, 40), 0),
    ("shr.s32 %r9, %r2, %r3;", (-8, 40), -1),
    ("shr.u32 %r9, %r2, 4;", (-16, 0), 2**28 - 1),
    ("div.s32 %r9, %r2, %r3;", (-7, 2), -3),
    ("rem.s32 %r9, %r2, %r3;", (-7, 2), -1),
    ("bfe.u32 %r9, %r2, 4, 8;", (0xABCDE, 0), 0xCD),
    ("bfe.s32 %r9, %r2, 4, 8;", (0xABCDE, 0), 0xFFFFFFCD),
    ("bfe.s32 %r9, %r2, 28, 8;", (0x90000000, 0), -7),
    ("bfi.b32 %r9, %r2, %r3, 16, 8;", (0x1AB, 0x11223344), 0x11AB3344),
    ("lop3.b32 %r9, %r2, %r3, 0x6400, 0xea;", (0xF3, 0x0F), 0x6403),
    ("lop3.b32 %r9, %r2, %r3, 0x00FF, 0xe4;", (0x1234, 0xABCD), 0xAB34),
    ("prmt.b32 %r9, %r2, %r3, 0x5410;", (0x33221100, 0x77665544), 0x55441100),
    ("prmt.b32 %r9, %r2, %r3, 0x8F0U;", (0x332211F0, 0x77), 0xF0FF00F0),
    ("add.s16x2 %r9, %r2, %r3;", (0x0001FFFF, 0x00010001), 0x00020000),
    ("sub.rn.f16x2 %r9, %r2, %r3;", (0x60056403, 0x60006000), 0x41006006),  # 514.5 - 512, 1027 - 512
    ("mul.rn.f16x2 %r9, %r2, %r3;", (0x3C013C01, 0x3C01BC01), 0x3C02BC02),  # (1 + 2**-10)**2 rounds to 1 + 2**-9
    ("mul.wide.s32 %rd4, %r2, %r3; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r9, %rd4;", (-2, 3), -1),
    ("mul.wide.u32 %rd4, %r2, %r3; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r9, %rd4;", (-2, 3), 2),
    ("cvt.s64.s32 %rd4, %r2; mul.hi.s64 %rd4, %rd4, -5; cvt.u32.u64 %r9, %rd4;", (7, 0), -1),
    ("mad.lo.s32 %r9, %r2, %r3, 5;", (-3, 4), -7),
    ("cvt.u64.u32 %rd4, %r2; add.s64 %rd4, %rd4, 1; cvt.s64.s32 %rd5, %rd4; cvt.u32.u64 %r9, %rd5;", (-1, 0), 0),
    ("{ .reg .b32 t; and.b32 t, %r3, 31; shr.b32 %r9, %r2, t; }", (256, 36), 16),
    ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r9, {%rs2, %rs1};", (0x12345678, 0), 0x56781234),
    ("setp.lt.s32 %p1, %r2, %r3; selp.b32 %r9, 1, 2, %p1;", (-1, 1), 1),
    ("setp.lt.u32 %p1, %r2, %r3; selp.b32 %r9, 1, 2, %p1;", (-1, 1), 2),
    ("setp.ne.f32 %p1, %r2, %r3; selp.b32 %r9, 1, 2, %p1;", (NAN, 1.0), 2),
    ("setp.neu.f32 %p1, %r2, %r3; selp.b32 %r9, 1, 2, %p1;", (NAN, 1.0), 1),
    ("max.f32 %r9, %r2, %r3;", (NAN, 1.0), 1.0),
    ("max.f32 %r9, %r2, %r3;", (-0.0, 0.0), 0.0),
    ("min.f32 %r9, %r2, %r3;", (0.0, -0.0), -0.0),
    ("min.xorsign.abs.f32 %r9, %r2, %r3;", (-7.0, 3.5), -3.5),
    ("min.xorsign.abs.f32 %r9, %r2, %r3;", (2.0, 3.5), 2.0),
    ("abs.f32 %r9, %r2;", (-2.5, 0), 2.5),
    ("neg.f32 %r9, %r2;", (0.0, 0), -0.0),
    ("add.rn.f32 %r9, %r2, %r3;", (1.0, 2.0**-24), 1.0),
    ("add.f32 %r9, %r2, 0f3F800000;", (0.5, 0), 1.5),
    ("mul.f32 %r9, %r2, %r3;", (TINY, 0.5), TINY / 2),
    ("fma.rn.f32 %r9, %r2, %r3, 0fBF801000;", (1 + 2.0**-12, 1 + 2.0**-12), 2.0**-24),
    # The product is just above the middle of two float32; in float64 the sum lands on it.
    ("fma.rn.f32 %r9, %r2, %r3, 0f3F800000;", (2.0**-24, 1 + 2.0**-23), 1 + 2.0**-23),
    ("ex2.approx.ftz.f32 %r9, %r2;", (-130.0, 0), 0.0),
    ("ex2.approx.ftz.f32 %r9, %r2;", (3.0, 0), 8.0),
    ("cvt.rn.bf16x2.f32 %r9, %r2, %r3;", (HALF_STEP, 2.0), 0x3F804000),
    ("cvt.rn.bf16x2.f32 %r9, %r2, %r3;", (1.0, HALF_STEP + 2.0**-7), 0x3F803F82),
    ("cvt.rn.f16x2.f32 %r9, %r2, %r3;", (1 + 2.0**-11, 65520.0), 0x3C007C00),
    ("cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r9, %rs1;", (1 + 3 * 2.0**-11, 0), 1 + 2.0**-9),
    ("cvt.u16.u32 %rs1, %r2; cvt.f32.bf16 %r9, %rs1;", (0x3FC0, 0), 1.5),
    ("cvt.rn.f32.s32 %r9, %r2;", (-(2**24) - 1, 0), -(2.0**24)),
]


@pytest.mark.parametrize(("body", "operands", "expected"), RESULTS)
def test_results_of_single_instructions(body, operands, expected):
    words = bits(*operands)
    execute(f"ld.global.v2.b32 {{%r2, %r3}}, [%rd1]; {body} st.global.b32 [%rd1], %r9;", words)
    assert words[0] == bits(expected)[0], f"{int(words[0]) % 2**32:#x}"


def test_threads_part_and_meet_again():
    """Each thread loops as often as its number says; then a shuffle needs them all."""
    words = torch.zeros(64, dtype=torch.int32)
    executed = execute(
        """
        mov.u32 %r2, 0;
        setp.eq.s32 %p1, %r1, 0;
        @%p1 bra $L__done;
$L__loop:
        add.s32 %r2, %r2, 3;
        sub.s32 %r3, %r1, 0;
        mul.lo.s32 %r3, %r3, 3;
        setp.lt.s32 %p2, %r2, %r3;
        @%p2 bra $L__loop;
$L__done:
        shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
        st.global.b32 [%rd3], %r4;
        """,
        words,
        threads=64,
    )
    assert words.tolist() == [3 * (i ^ 1) for i in range(64)]
    assert executed["shfl.sync.bfly.b32"] == 2 and executed["mul.lo.s32"] == 31 + 63


def test_shuffles():
    words = torch.zeros(32, dtype=torch.int32)
    execute("xor.b32 %r2, %r1, 5; shfl.sync.idx.b32 %r4, %r1, %r2, 31, -1; st.global.b32 [%rd3], %r4;", words)
    assert words.tolist() == [i ^ 5 for i in range(32)]
    execute("shfl.sync.up.b32 %r4, %r1, 1, 0, -1; st.global.b32 [%rd3], %r4;", words)
    assert words.tolist() == [0, *range(31)]
    execute("shfl.sync.down.b32 %r4, %r1, 2, 31, -1; st.global.b32 [%rd3], %r4;", words)
    assert words.tolist() == [*range(2, 32), 30, 31]


def test_a_barrier_that_part_of_a_warp_misses_ends_the_run():
    body = "setp.lt.s32 %p1, %r1, 32; @%p1 bra $L__a; bar.sync 0; bra $L__b; $L__a: bar.sync 0; $L__b: bar.sync 0;"
    with pytest.raises(EmulationError, match="different barriers"):
        execute(body, torch.zeros(1, dtype=torch.int32), threads=64)


STORE_ROWS = """
	mov.b32 %r20, global_smem;
	shl.b32 %r21, %r1, 4;
	add.s32 %r22, %r20, %r21;
	mul.wide.u32 %rd4, %r21, 1;
	add.s64 %rd5, %rd1, %rd4;
	ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd5];
	st.shared.v4.b32 [%r22], {%r2, %r3, %r4, %r5};
	bar.sync 0;
"""
"""512 bytes of the tensor to shared memory; thread i's 16 bytes to %r22."""


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("truncating", [False, True])
def test_matrix_product_of_loaded_fragments(kind, truncating):
    """A [16, 16] row by row, then B [16, 8] row by row, are loaded as the manual shows; small integers are exact."""
    generator = torch.Generator().manual_seed(0)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b = torch.randint(-8, 8, (16, 16), generator=generator), torch.randint(-8, 8, (16, 8), generator=generator)
    words = torch.zeros(64 * 4, dtype=torch.int32)
    words[:192] = torch.cat([a.flatten(), b.flatten()]).to(dtype).view(torch.int32)
    execute(
        STORE_ROWS
        + f"""
        and.b32 %r6, %r1, 15;          // row of A, and which half of its columns
        shl.b32 %r6, %r6, 5;
        shr.u32 %r7, %r1, 4;
        and.b32 %r7, %r7, 1;
        shl.b32 %r7, %r7, 4;
        add.s32 %r6, %r6, %r7;
        add.s32 %r6, %r6, %r20;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r6];
        and.b32 %r8, %r1, 15;          // row of B
        shl.b32 %r8, %r8, 4;
        add.s32 %r8, %r8, %r20;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r14, %r15}}, [%r8+512];
        mov.b32 %r16, 0f3F800000;
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r30, %r31, %r32, %r33}},
            {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r16, %r16, %r16}};
        setp.lt.s32 %p1, %r1, 32;
        shr.u32 %r17, %r1, 2;          // lane 4 g + t: row g, columns 2 t and 2 t + 1
        shl.b32 %r17, %r17, 3;
        and.b32 %r18, %r1, 3;
        shl.b32 %r18, %r18, 1;
        add.s32 %r17, %r17, %r18;
        mul.wide.u32 %rd4, %r17, 4;
        add.s64 %rd5, %rd1, %rd4;
        @%p1 st.global.v2.b32 [%rd5], {{%r30, %r31}};
        @%p1 st.global.v2.b32 [%rd5+256], {{%r32, %r33}};
        """.replace("},\n            {", "}, {"),
        words,
        threads=64,
        shared=1024,
        truncating=truncating,
    )
    assert torch.equal(words[:128].view(torch.float32).view(16, 8), (a @ b + 1).float())


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_are_stored_as_they_are_loaded(trans):
    words = torch.arange(128, dtype=torch.int32)
    execute(
        STORE_ROWS
        + f"""
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r22];
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r22+512], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r22+512];
        st.global.v4.b32 [%rd5], {{%r2, %r3, %r4, %r5}};
        """,
        words,
        shared=1024,
    )
    matrices = torch.arange(128, dtype=torch.int32).view(torch.int16).view(4, 8, 8)
    assert torch.equal(words.view(torch.int16).view(4, 8, 8), matrices.mT if trans else matrices)


def test_accesses_outside_of_tensors_and_misaligned_ones_end_the_run():
    words = torch.zeros(16, dtype=torch.int32)
    for access, reason in (("[%rd3]", "a tensor of 64"), ("[%rd1+-4]", "bytes into"), ("[%rd1+2]", "misaligned")):
        with pytest.raises(EmulationError, match=reason):
            execute(f"ld.global.b32 %r2, {access};", words)
    with pytest.raises(EmulationError, match="of 64 shared bytes"):
        execute("mov.b32 %r2, global_smem; ld.shared.b32 %r3, [%r2+64];", words, shared=64)
    with pytest.raises(EmulationError, match="bytes at"):  # as 32-bit arithmetic would have it
        execute("cvt.u32.u64 %r2, %rd1; cvt.u64.u32 %rd4, %r2; ld.global.b32 %r3, [%rd4];", words)


@pytest.mark.parametrize("wait", [True, False])
def test_an_asynchronous_copy_is_there_when_it_was_waited_for(wait):
    words = torch.arange(1, 129, dtype=torch.int32)
    execute(
        f"""
        mov.b32 %r20, global_smem;
        shl.b32 %r21, %r1, 4;
        add.s32 %r22, %r20, %r21;
        cvt.u64.u32 %rd4, %r21;
        add.s64 %rd5, %rd1, %rd4;
        selp.b32 %r6, 0, 16, %p1;
        setp.gt.s32 %p1, %r1, 15;
        selp.b32 %r6, 0, 16, %p1;      // the upper half gets zeros
        cp.async.cg.shared.global [%r22], [%rd5], 0x10, %r6;
        cp.async.commit_group;
        {"cp.async.wait_group 0;" if wait else ""}
        bar.sync 0;
        xor.b32 %r23, %r22, 16;
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r23];
        st.global.v4.b32 [%rd5], {{%r2, %r3, %r4, %r5}};
        """,
        words,
        shared=512,
        late_copies=True,
    )
    rows = torch.arange(1, 129, dtype=torch.int32).view(16, 2, 4).flip(1).reshape(32, 4)
    rows[16:] = 0
    assert torch.equal(words.view(32, 4), rows if wait else torch.full_like(rows, -1))


EXCHANGE = """
	mov.b32 %r20, global_smem;
	shl.b32 %r21, %r1, 2;
	add.s32 %r22, %r20, %r21;
	xor.b32 %r23, %r22, {distance};
	st.shared.b32 [%r22], %r1;
	{barrier}
	ld.shared.b32 %r3, [%r23];
	st.global.b32 [%rd3], %r3;
"""


def test_races_are_found():
    words = torch.zeros(64, dtype=torch.int32)
    for distance, barrier, is_race in (
        (4, "", True), (4, "bar.warp.sync -1;", False), (128, "bar.warp.sync -1;", True), (128, "bar.sync 0;", False),
        (0, "", False),
    ):  # fmt: skip
        body = EXCHANGE.format(distance=distance, barrier=barrier)
        options = {"threads": 64, "shared": 256, "races": True}
        if is_race:
            with pytest.raises(EmulationError, match="has just written"):
                execute(body, words, **options)
        else:
            execute(body, words, **options)
            assert words.tolist() == [i ^ (distance // 4) for i in range(64)]
    overwriting = EXCHANGE.format(distance=128, barrier="bar.sync 0;") + "st.shared.b32 [%r22], 77;"
    with pytest.raises(EmulationError, match="has just read"):
        execute(overwriting, words, threads=64, shared=256, races=True)


@pytest.mark.parametrize("backwards", [False, True])
def test_every_thread_of_a_grid_draws_its_own_ticket(backwards):
    words = torch.zeros(2 + 6 * 32, dtype=torch.int32)
    body = """
        mov.u64 %rd6, 1;
        atom.global.gpu.acq_rel.add.u64 %rd7, [%rd1], %rd6;
        mov.u32 %r5, %ctaid.y;
        mov.u32 %r6, %nctaid.x;
        mov.u32 %r7, %ctaid.x;
        mad.lo.s32 %r5, %r5, %r6, %r7;
        mad.lo.s32 %r5, %r5, 32, %r1;
        mul.wide.u32 %rd4, %r5, 4;
        add.s64 %rd5, %rd1, %rd4;
        cvt.u32.u64 %r8, %rd7;
        st.global.b32 [%rd5+8], %r8;
        """
    execute(body, words.view(torch.int32), size=(3, 2), ctas=4, backwards=backwards)
    assert words[:2].view(torch.int64).item() == 6 * 32
    assert sorted(words[2:].tolist()) == list(range(6 * 32))
    assert (words[2] == 0) != backwards


def test_what_is_not_known_is_refused():
    for body in (
        "sin.approx.f32 %r2, %r3;",
        "add.rz.f32 %r2, %r3, %r4;",
        "min.NaN.f32 %r2, %r3, %r4;",
        "shfl.sync.idx.b32 %r2, %r3, 0, 31, 15;",
    ):
        with pytest.raises(EmulationError, match="cannot do"):
            execute(body, torch.zeros(1, dtype=torch.int32))


@pytest.mark.long
def test_compiled_kernels_agree_with_the_reference():
    """A prefill, a step that flushes, dequantization, and attention, in a process without Triton's interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "INNERQ_EMULATE": "90", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    chosen = "test_compiled"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_ptx_kernels.py")]
    done = subprocess.run(
        [*command, "-k", chosen], cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
