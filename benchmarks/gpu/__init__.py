"""Everything that has to be shown on a GPU, in one command: ``make gpu``, in less than nine minutes.

How to read it: ``__main__`` runs the units of PLAN one after the other, each in a process of its own with a time limit,
so that a kernel that crashes or hangs costs its own unit. Their rows go into one JSON file, which ``tables`` renders.

    machine      versions, and how fast this GPU's memory can be read
    correctness  tests/test_gpu.py and the tests of the Triton kernels, with pytest, on the device
    attention    decode attention of one layer against the 16-bit ways that a user has
    append       what a step pays to append its token, and how fast a prompt is quantized
    memory       how much cache fits beside a model
    models       tokens per second of whole models against StaticCache + Inductor

Why a time can be believed (``timing``): a contender's result is compared with the reference or with float64 before it
is timed, and one that is wrong gets no time. Contenders take turns, round after round; each is a CUDA graph timed by
``triton.testing.do_bench``, which overwrites the L2 cache before every call; times are medians. A plain read of the
bytes that a contender needs takes turns with the rest, and "share of the ceiling" is its time over the contender's:
what launching a graph costs, and writing back what overwrote the cache, is in both.

Without a GPU the same code runs dry, one part of each section: tiny shapes on the CPU, one call each. That shows that
every section comes to its end and that its rows render; graphs, ``do_bench`` and memory limits are not run.
"""
