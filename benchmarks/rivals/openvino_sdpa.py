"""OpenVINO's stateful attention with a cache of its own in f16, u8 or u4.

The graph is the one that OpenVINO makes of an exported decoder layer (ReadValue, Gather, Concat, Assign around
ScaledDotProductAttention); its CPU plugin fuses it into one operator that appends a token and attends.
"""

from __future__ import annotations

import functools

import numpy as np

from rivals.interface import COPIES, Case, Rival, Step


def build_model(case: Case):  # noqa: ANN201 - openvino.Model, which is not imported here
    """Inputs query [1, q_heads or heads, L, D], key and value [1, heads, L, D], beam [1]; states "key" and "value"."""
    import openvino
    from openvino import opset13 as op
    from openvino.op.util import Variable, VariableInfo

    heads, head_dim, group = case.heads, case.head_dim, case.q_heads // case.heads
    query = op.parameter([-1, -1, -1, head_dim], np.float32, name="query")
    beam = op.parameter([-1], np.int32, name="beam")
    inputs, assigns, repeated = [], [], []
    for name in ("key", "value"):
        fresh = op.parameter([-1, heads, -1, head_dim], np.float32, name=name)
        info = VariableInfo()
        info.data_shape, info.data_type = openvino.PartialShape([-1, heads, -1, head_dim]), openvino.Type.f32
        info.variable_id = name
        variable = Variable(info)
        batch = op.gather(op.shape_of(fresh), op.constant(np.array([0])), op.constant(0))
        empty = op.concat([batch, op.constant(np.array([heads, 0, head_dim]))], 0)
        past = op.read_value(op.broadcast(op.constant(np.float32(0)), empty), variable)
        present = op.concat([op.gather(past, beam, op.constant(0)), fresh], 2)
        assigns.append(op.assign(present, variable))
        # Only this way of repeating heads is recognised and fused: no repeated copy is ever made.
        ones = op.constant(np.ones((1, 1, group, 1, 1), np.float32))
        wide = op.multiply(op.unsqueeze(present, op.constant(np.array([2]))), ones)
        repeated.append(op.reshape(wide, op.constant(np.array([0, case.q_heads, -1, head_dim])), True))
        inputs.append(fresh)
    out = op.scaled_dot_product_attention(query, *repeated, causal=False)
    return openvino.Model([op.result(out)], assigns, [query, *inputs, beam])


def prepare(precision: str, case: Case) -> Step:
    """A step over infer requests that hold a cache of this precision each.

    Of the settings tried (16384 tokens; group sizes 32, 64 and a whole head; arithmetic in bf16, f16 and f32) these are
    the fastest: a whole head as one group, which is the default, and arithmetic in f16 where the CPU has it.
    """
    import openvino

    query, key, value = case.data()
    core = openvino.Core()
    settings = {"KV_CACHE_PRECISION": precision, "INFERENCE_NUM_THREADS": case.threads, "PERFORMANCE_HINT": "LATENCY"}
    if "FP16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        settings["INFERENCE_PRECISION_HINT"] = "f16"
    compiled = core.compile_model(build_model(case), "CPU", settings)
    beam = np.zeros(1, np.int32)
    # The output of this first call is not used: as few query heads as the operator takes are enough.
    first = {"query": np.zeros_like(key[:, :, :-1]), "key": key[:, :, :-1], "value": value[:, :, :-1], "beam": beam}
    one = {"query": query, "key": key[:, :, -1:].copy(), "value": value[:, :, -1:].copy(), "beam": beam}
    requests = [compiled.create_infer_request() for _ in range(COPIES)]
    for request in requests:
        request.infer(first)

    def step(i: int) -> np.ndarray:
        return requests[i % COPIES].infer(one, share_inputs=True, share_outputs=True)[0]

    return step


RIVALS = tuple(
    Rival(f"OpenVINO {precision}", "openvino", bits, functools.partial(prepare, precision), appends=True)
    for precision, bits in (("f16", 16), ("u8", 8), ("u4", 4))
)
