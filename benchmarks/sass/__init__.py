"""Compiles the Triton kernels ahead of time, without a GPU: registers, spills, instructions, and the speed these allow.

    python benchmarks/sass            compares with the recorded figures; fails if one got worse by more than 10 %
    python benchmarks/sass --record   records them
    python benchmarks/sass --only base --target 90
    python benchmarks/sass --only base --target 90 --option num_stages=3     tries a variant, compares with nothing

``launches`` says what is compiled, ``compilation`` compiles it, ``listing`` reads the disassembly and counts.

"share" is a bound, not a model: of an H100's memory bandwidth, what the number of instructions of each kind allows
at best. It knows no latency. A simulator of one multiprocessor, which stood here until 8d859c3, found that loops waited
for memory which counts called bound by bandwidth; that is mended (benchmarks/LOG.md, "a timing model of the kernels").
"""
