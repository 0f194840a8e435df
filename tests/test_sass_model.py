"""The timing model of `make sass` on loops whose speed is known beforehand; no compiler, no Triton."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def sass():
    """Imports a module of the package, which is not installed."""
    sys.path.append(str(BENCHMARKS))
    yield lambda name: importlib.import_module(f"sass.{name}")
    sys.path.remove(str(BENCHMARKS))


def simulate(sass, loop, warps=4, programs=1, latency=1000.0, iterations=40, **settings):
    """Runs [(text, scheduling bits)] as a loop."""
    instructions = [sass("listing").Instruction(text, **bits) for text, bits in loop]
    steps = sass("machine").steps_of(instructions)
    return sass("simulate").Multiprocessor(steps, warps, programs, latency, **settings).run(iterations, 8)


LISTING = """
.L_x_1:
        /*0000*/                   LDG.E.64 R2, desc[UR4][R4.64] ;     /* 0x0000000404027981 */
                                                                       /* 0x000ea2000c1e1b00 */
        /*0010*/              @!P0 IADD3 R5, R2, 0x1, RZ ;             /* 0x0000000102057810 */
                                                                       /* 0x004fca0007ffe0ff */
        /*0020*/               @P1 BRA `(.L_x_1) ;                     /* 0xfffffffc00f41947 */
                                                                       /* 0x000fea000083ffff */
"""


def test_scheduling_bits_are_read_from_the_encoding(sass):
    program = sass("listing").parse(LISTING)
    load, add, jump = program.instructions
    assert (load.name, load.stall, load.write, load.read, load.waits) == ("LDG.E.64", 1, 2, None, ())
    assert (add.name, add.guard, add.stall, add.write, add.waits) == ("IADD3", "@!P0", 5, None, (2,))
    assert jump.label == ".L_x_1" and program.loop() == (0, 3)


def test_programs_that_fit_follow_from_registers_and_shared_memory(sass):
    fit = sass("predict").resident_programs
    assert fit(229, 26624, 4) == 2  # 232 x 128 threads are 29696 of 65536 registers
    assert fit(168, 0, 4) == 3
    assert fit(128, 0, 4) == 4
    assert fit(32, 0, 4) == 16  # 64 warps
    assert fit(32, 0, 1) == 32  # programs
    assert fit(64, 100 * 1024, 4) == 2


READ = [(f"LDG.E.128 R{8 + 4 * i}, desc[UR4][R4.64+{512 * i:#x}]", {"stall": 4, "write": i}) for i in range(4)]
READ += [(f"FADD R4, R{8 + 4 * i}, R4", {"stall": 4, "waits": (i,)}) for i in range(4)]


def test_reading_with_many_warps_is_bound_by_bandwidth(sass):
    run = simulate(sass, READ, warps=8, programs=8)
    assert run.busy["memory bandwidth"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("latency", [900.0, 1800.0])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_reading_with_few_warps_obeys_littles_law(sass, warps, latency):
    """Bytes per cycle are bytes in flight per latency, and each warp keeps 4 x 512 bytes in flight."""
    run = simulate(sass, READ, warps=warps, latency=latency)
    in_flight = warps * 4 * 512
    assert in_flight / run.cycles == pytest.approx(in_flight / latency, rel=0.15)
    assert run.cycles > latency
    assert max(run.waits, key=run.waits.get) == "device memory"


def test_a_chain_of_dependent_additions_takes_its_latency(sass):
    """Four cycles each, however many warps a scheduler has, until there are four of them."""
    chain = [("FFMA R1, R1, R2, R3", {"stall": 4})] * 16
    for per_scheduler in (1, 2, 4):
        run = simulate(sass, chain, warps=4 * per_scheduler)
        assert run.cycles == pytest.approx(16 * 4, rel=0.1)
    assert run.busy["issue"] > 0.9
    assert simulate(sass, chain, warps=32).cycles == pytest.approx(16 * 8, rel=0.1)


def test_integer_logic_takes_every_other_cycle(sass):
    run = simulate(sass, [("LOP3.LUT R1, R2, R3, R4, 0xe2, !PT", {})] * 16, warps=8)
    assert run.cycles == pytest.approx(2 * 16 * 2, rel=0.1)
    assert run.busy["alu"] > 0.9


def test_integer_and_float_instructions_share_the_cycles_of_a_scheduler(sass):
    both = [("LOP3.LUT R1, R2, R3, R4, 0xe2, !PT", {}), ("FFMA R5, R6, R7, R8", {})] * 8
    assert simulate(sass, both, warps=4).cycles == pytest.approx(16, rel=0.1)


def test_a_loop_of_matrix_products_keeps_the_matrix_unit_busy(sass):
    loop = [("HMMA.16816.F32 R4, R8, R12, R4", {"stall": 2})] * 8
    run = simulate(sass, loop, warps=8)
    assert run.busy["matrix"] > 0.95
    assert run.cycles == pytest.approx(2 * 8 * sass("hopper").MATRIX_CYCLES, rel=0.05)


def test_the_sheets_matrix_rate_is_not_exceeded(sass):
    hopper = sass("hopper")
    operations = 2 * 16 * 8 * 16 * hopper.SCHEDULERS / hopper.MATRIX_CYCLES * hopper.PROCESSORS * hopper.CLOCK
    assert 0.55 * 989e12 < operations < 0.7 * 989e12


def copies(outstanding):
    """Waits for all but some groups of copies, computes, and starts the next group."""
    return [
        (f"DEPBAR.LE SB0, {outstanding:#x}", {"stall": 4}),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", {"stall": 1}),
        *[("FFMA R1, R1, R2, R3", {"stall": 4})] * 200,
        ("BAR.SYNC.DEFER_BLOCKING 0x0", {"stall": 1}),
        ("LDGSTS.E.128 [R4], desc[UR4][R6.64]", {"stall": 4}),
        ("LDGDEPBAR", {"stall": 1, "write": 0}),
    ]


def test_copies_started_an_iteration_ahead_hide_their_latency(sass):
    exposed, hidden = (simulate(sass, copies(outstanding)).cycles for outstanding in (0, 1))
    assert exposed == pytest.approx(800 + 1000, rel=0.1)
    assert hidden == pytest.approx(1000, rel=0.1)


def test_a_barrier_lets_the_slowest_warp_decide(sass):
    loop = [("BAR.SYNC.DEFER_BLOCKING 0x0", {}), ("FFMA R1, R1, R2, R3", {"stall": 10})]
    barrier = sass("hopper").BARRIER_LATENCY
    assert simulate(sass, loop, warps=4).cycles == pytest.approx(barrier + 10, abs=2)
    # Eight warps share four schedulers, so each waits for one that issues a cycle later.
    assert barrier + 10 <= simulate(sass, loop, warps=8).cycles <= barrier + 14


def test_shared_memory_delivers_128_bytes_a_cycle(sass):
    run = simulate(sass, [("LDS.128 R4, [R2]", {"stall": 1, "write": 0})] * 16, warps=16)
    assert run.cycles == pytest.approx(16 * 16 * 4, rel=0.05)  # 512 bytes each
    assert run.busy["shared memory"] > 0.95


def test_bytes_that_several_threads_ask_for_are_fetched_once(sass):
    machine, listing = sass("machine"), sass("listing")
    loads = [listing.Instruction("LDG.E.64 R2, [R4]"), listing.Instruction("LDG.E R2, [R4]")]
    steps = machine.steps_of(loads, read=192.0)
    assert [step.memory_bytes for step in steps] == [128.0, 64.0]
    assert [step.memory_bytes for step in machine.steps_of(loads)] == [256.0, 128.0]


BRANCHES = """
        /*0000*/              @P0 BRA `(.L_x_1) ;
        /*0010*/                   MOV R1, R2 ;
        /*0020*/              @P1 BRA `(.L_x_0) ;
        /*0030*/                   CALL.REL.NOINC `($division) ;
        /*0040*/                   MOV R3, R4 ;
.L_x_0:
        /*0050*/                   FADD R1, R1, R1 ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   MOV R5, R6 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2) ;
"""


def test_the_longest_way_through_a_program_calls_no_slow_division(sass):
    program = sass("listing").parse(BRANCHES)
    way = sass("paths").heaviest_way(program, trips=3)
    assert [step.base for step in way.instructions] == ["BRA", "MOV", "BRA", *["FADD", "BRA"] * 3, "EXIT"]
    assert way.loop == (3, 9)
    around = sass("paths").heaviest_way(program, trips=0)
    assert [step.text for step in around.instructions[1:]] == ["MOV R5, R6", "EXIT"]


def test_a_program_is_run_once_by_all_of_its_warps(sass):
    steps = sass("machine").steps_of([sass("listing").Instruction("FFMA R1, R1, R2, R3", stall=4)] * 10)
    machine = sass("simulate").Multiprocessor(steps, warps=4, programs=1, latency=1000.0)
    assert machine.run_once({5}) == 9 * 4 + 1
    assert machine.passed == {5: 20}


def test_copies_behind_the_last_trip_are_not_executed(sass):
    listing, paths = sass("listing"), sass("paths")
    copy = listing.Instruction("LDGSTS.E.64 [R1], [R2.64]")
    way = paths.Way((copy, copy, *[listing.Instruction("FADD R1, R1, R1"), copy] * 5), loop=(2, 12))
    guards = [each.guard for each in paths.without_idle_copies(way) if each.base == "LDGSTS"]
    assert guards == [""] * 5 + ["@!PT"] * 2
