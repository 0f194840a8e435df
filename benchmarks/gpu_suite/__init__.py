"""Everything that has to be shown on a GPU, in one command: correctness, tests, tables, one JSON file.

``make gpu`` runs it; ``render.py`` turns the file into the README's tables. Without a GPU the same code runs dry: tiny
shapes on the CPU, the Triton kernels of the suite in Triton's interpreter.
"""
