"""llama.cpp's attention: the ggml operators that its graph runs for one layer, on caches laid out as it lays them out.

Called through the libraries inside llama-cpp-python, so nothing else of a model is in the time. Keys and values are
[tokens, heads, head_dim]; without flash attention values are transposed, which llama.cpp allows in 16 bit only.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import numpy as np

from rivals.interface import COPIES, Case, Rival, Step

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
"""ggml_type."""


class _Init(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def load_library() -> ctypes.CDLL:
    """libggml-cpu, whose symbols include those of libggml-base; results are pointers unless said otherwise."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    signatures = {
        "ggml_init": [_Init],
        "ggml_new_tensor_3d": [pointer, ctypes.c_int, number, number, number],
        "ggml_permute": [pointer, pointer, *[ctypes.c_int] * 4],
        "ggml_flash_attn_ext": [pointer] * 5 + [real] * 3,
        "ggml_mul_mat": [pointer] * 3,
        "ggml_soft_max_ext": [pointer] * 3 + [real] * 2,
        "ggml_new_graph": [pointer],
        "ggml_get_data": [pointer],
        "ggml_backend_cpu_init": [],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, pointer
    library.ggml_build_forward_expand.argtypes = [pointer, pointer]
    library.ggml_backend_cpu_set_n_threads.argtypes = [pointer, ctypes.c_int]
    library.ggml_backend_graph_compute.argtypes = [pointer, pointer]
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def prepare(kind: str, flash: bool, case: Case) -> Step:
    """A step over caches of this ggml type."""
    ggml = load_library()
    query, key, value = (x[0] for x in case.data())
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, case.threads)
    context = ggml.ggml_init(_Init(COPIES * 2 * key.nbytes + 2**24, None, False))

    def tensor(kind: str, array: np.ndarray) -> int:
        """A tensor of ggml with these numbers; ggml counts axes from the last one."""
        array = np.ascontiguousarray(array, np.float32)
        made = ggml.ggml_new_tensor_3d(context, TYPES[kind], *array.shape[::-1])
        rows, width = math.prod(array.shape[:2]), array.shape[2]
        ggml.ggml_quantize_chunk(TYPES[kind], array.ctypes.data, ggml.ggml_get_data(made), 0, rows, width, None)
        return made

    def heads_first(made: int) -> int:
        return ggml.ggml_permute(context, made, 0, 2, 1, 3)

    q = heads_first(tensor("f32", query.transpose(1, 0, 2)))
    mask = tensor("f16", np.zeros((1, 1, case.tokens)))
    scale = case.head_dim**-0.5
    graphs, outputs = [], []
    for _ in range(COPIES):
        k = heads_first(tensor(kind, key.transpose(1, 0, 2)))
        if flash:
            v = heads_first(tensor(kind, value.transpose(1, 0, 2)))
            out = ggml.ggml_flash_attn_ext(context, q, k, v, mask, scale, 0.0, 0.0)
        else:
            v = tensor(kind, value.transpose(0, 2, 1))
            weights = ggml.ggml_soft_max_ext(context, ggml.ggml_mul_mat(context, k, q), mask, scale, 0.0)
            out = ggml.ggml_mul_mat(context, v, weights)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, out)
        graphs.append(graph)
        pointer = ctypes.cast(ggml.ggml_get_data(out), ctypes.POINTER(ctypes.c_float))
        outputs.append(np.ctypeslib.as_array(pointer, (1, case.q_heads, 1, case.head_dim)))

    def step(i: int) -> np.ndarray:
        if ggml.ggml_backend_graph_compute(backend, graphs[i % COPIES]):
            raise RuntimeError("ggml could not compute the graph")
        return outputs[i % COPIES]

    return step


RIVALS = (
    Rival("llama.cpp f16, no flash attention", "llama-cpp-python", 16, functools.partial(prepare, "f16", False)),
    *(
        Rival(f"llama.cpp {kind}", "llama-cpp-python", bits, functools.partial(prepare, kind, True))
        for kind, bits in (("f16", 16), ("q8_0", 8), ("q4_0", 4))
    ),
)
