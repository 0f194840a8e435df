"""What is known of an H100 SXM. Every figure names its source; none was measured for this project.

Sources: [sheet] NVIDIA's H100 data sheet and architecture white paper; [guide] CUDA C++ Programming Guide, throughput
of native arithmetic instructions, compute capability 9.0, and the technical specifications beside it; [luo] Luo et
al., arXiv 2402.13499 and 2501.12084, microbenchmarks of an H100; [huerta] Huerta et al., arXiv 2503.20481, the cores of
an RTX A6000 (Ampere; no such study of Hopper was found); [sass] what the compiler's own waits in sm_90 code say.
"""

from __future__ import annotations

PROCESSORS = 132
"""[sheet]"""

CLOCK = 1.755e9
"""Cycles per second [sheet: 989 dense float16 teraflop/s are 132 x 4096 operations x 1.83 GHz; 1.755 GHz is what [luo]
and most tools read]. A card may run faster (1.98 GHz) or, at its power limit, slower: shares of the memory ceiling of
kernels that wait for memory hardly depend on it, those of kernels that issue instructions are proportional to it."""

BANDWIDTH = 3.35e12
"""Bytes per second [sheet]: what shares are shares of."""

REACHED_BANDWIDTH = 3.0e12
"""Bytes per second that the best kernels reach: FlashMLA's decode attention (its README) and a plain device-to-device
copy. So no share can be predicted above 90 %."""

LATENCIES_NS = (500, 700, 1000)
"""Of a load from device memory under load, in nanoseconds. An idle device answers in less (478 cycles, 270 ns [luo]);
queues at high bandwidth add what no source we know states, hence three assumptions."""

PORT_BYTES_PER_CYCLE = 64
"""From the second-level cache to one multiprocessor, per cycle [sheet of the A100: 5120 bytes for all of it]."""

L2_LATENCY = 262
"""Cycles [luo: 261.5]."""

SCHEDULERS = 4
LANES_PER_WARP = 32

# Occupancy of a multiprocessor [guide].
REGISTERS, REGISTER_STEP = 65536, 8
SHARED_BYTES, SHARED_STEP, SHARED_PER_PROGRAM = 233472, 128, 1024
WARPS, PROGRAMS = 64, 32

# Cycles that a warp's instruction keeps a unit of one scheduler busy: 128 / lanes per cycle and multiprocessor.
ALU_CYCLES = 2
"""64 lanes [guide: logic, shift, compare, add]."""
FMA_CYCLES = 2
"""Two such units, 128 lanes [guide: float32]; integer multiply-add runs in one of them, 64 lanes [guide]."""
SPECIAL_CYCLES = 8
"""16 lanes [guide: reciprocal, exp2, type conversions by I2F, F2I, F2F]."""
UNIFORM_CYCLES = 2
"""[huerta]"""
MATRIX_CYCLES = 6.4
"""Of m16n8k16 in float16 or m16n8k32 in int8: 4 at the sheet's 4096 operations per cycle and multiprocessor, of which
``mma.sync`` reaches 62.9 % on Hopper [luo]."""
MEMORY_CYCLES = 4
"""32 lanes [guide: shuffles; huerta: one address calculation per 4 cycles and scheduler]; the compiler spaces LDS,
SHFL and LDGSTS so as well [sass]."""
MEMORY_QUEUE = 4
"""Memory instructions that a scheduler may issue before the unit has taken them [huerta: 5 with the one inside]."""

SHARED_BYTES_PER_CYCLE = 128
"""Of a multiprocessor [guide]."""

# Cycles from issue until a scoreboard is clear, where nothing is in the way.
SHARED_LATENCY = 29
"""Load from shared memory [luo]; LDSM is taken for the same."""
SHUFFLE_LATENCY = 24
"""[huerta: as shared memory, in an A6000]"""
SPECIAL_LATENCY = 24
"""MUFU and conversions: about 18 to 23 in Ampere [huerta], and a cycle per quarter warp."""
CONSTANT_LATENCY = 30
"""LDC and S2R: rough; they stand before loops."""
OPERANDS_READ = 12
"""Until a memory instruction has read its registers: 9 to 14 [huerta]."""
PROGRAM_LATENCY = 300
"""From the end of a program to the first instruction of the one that takes its place [rough]."""
BARRIER_LATENCY = 24
"""From the last warp's arrival [rough: a synchronisation of one warp costs 20 to 30]."""
