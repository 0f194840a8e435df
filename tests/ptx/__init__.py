"""A functional emulator of the PTX that Triton generates: it runs what the compiler made of a kernel, without a GPU.

All threads of many programs at once, as NumPy arrays. It says what an instruction computes, not how long it takes.
"""
