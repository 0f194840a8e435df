"""Other ways to attend over a long cache on a CPU, each in a file of its own behind one interface.

None is a dependency. ``pip install -r benchmarks/rivals.txt`` installs them, ``make rivals`` also runs the benchmark.
"""

from rivals import llama_cpp_ggml, openvino_sdpa, torch_sdpa, transformers_quantized
from rivals.interface import COPIES, Case, Rival

GROUPS: dict[str, tuple[Rival, ...]] = {
    "torch": torch_sdpa.RIVALS,
    "transformers": transformers_quantized.RIVALS,
    "openvino": openvino_sdpa.RIVALS,
    "llama.cpp": llama_cpp_ggml.RIVALS,
}
"""Rivals that may share a process, by the name of the group."""

__all__ = ["COPIES", "GROUPS", "Case", "Rival"]
