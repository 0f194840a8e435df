"""Compiles the Triton kernels ahead of time, without a GPU: their instructions counted, and how long they would take.

    python benchmarks/sass            compares with the recorded figures; fails if one got worse by more than 10 %
    python benchmarks/sass --record   records them
    python benchmarks/sass --only base --target 90
    python benchmarks/sass --only base --target 90 --option num_stages=3     tries a variant, compares with nothing

``launches`` says what is compiled, ``compilation`` compiles it, ``listing`` reads the disassembly, ``counts`` counts
instructions; ``hopper`` holds what is known about the device, ``machine`` what each instruction costs there,
``paths`` finds what a program runs, ``simulate`` runs it on one multiprocessor, ``predict`` says what follows for loops
and ``calls`` for whole calls of decode attention (``--calls base``).
"""
