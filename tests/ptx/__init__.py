"""A functional emulator of the PTX that Triton generates: it runs what the compiler made of a kernel, without a GPU.

What for: Triton's interpreter runs a kernel's source, so it cannot show what compiling makes of it. This did, where no
GPU was at hand (benchmarks/LOG.md, "the kernels as compiled code, without a GPU"): Triton 3.6 reduces wrongly over
lanes that are no neighbours and over several warps, fused products and sums changed dequantized keys, threads read a
row's counts while another wrote them. It watches for missing barriers, and takes all that hardware leaves open as
badly as it may be. ``make emulate`` runs the kernels' tests on it.

When to delete it: when CI runs ``make gpu`` on a GPU with the oldest and the newest supported Triton, and
``compute-sanitizer --tool racecheck`` on the kernels' tests. Until then it is the only check of compiled code.

All threads of many programs at once, as NumPy arrays. It says what an instruction computes, not how long it takes.
"""
