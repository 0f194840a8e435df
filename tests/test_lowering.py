"""What Inductor makes of a whole compiled model for a GPU, by the code that it writes; no GPU, nothing runs.

One process compiles a Llama of two layers three times for an H100 that torch is made to believe in.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from innerq_compile.numerics.layout import LayerState

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the code itself"),
]

WORKER = Path(__file__).with_name("lowering_worker.py")
LAYERS, CAPACITY = 2, 4096
STEP = {"append_step_kernel", "decode_attention_kernel", "combine_kernel"}
PROMPT = {"key_range_kernel", "key_norm_kernel", "quantize_kernel", "window_kernel"}
COUNTS = LayerState._fields.index("counts")


@pytest.fixture(scope="module")
def lowered():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    done = subprocess.run([sys.executable, WORKER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def calls(graph, name):
    return [arguments for called, arguments in graph["calls"] if called == name]


def is_input(argument):
    return argument.startswith("arg")


@pytest.mark.parametrize("name", ["decode", "generate", "prefill"])
def test_nothing_keeps_a_graph_out_of_cuda_graphs(lowered, name):
    """One partition, all on the GPU; what it changes has a fixed address; torch warns of nothing."""
    graph = lowered[name]
    assert graph["partitions"] == 1
    assert graph["skips"] == 0
    [indices] = graph["graphs"]
    assert set(indices["mutated_input_idxs"]) <= set(indices["static_input_idxs"])
    assert graph["warnings"] == []


@pytest.mark.parametrize("name", ["decode", "generate", "prefill"])
def test_torch_analyses_a_kernel_once_and_not_in_every_layer(lowered, name):
    graph = lowered[name]
    assert sorted(graph["analysed"]) == sorted({called for called, _ in graph["calls"]} & (STEP | PROMPT))


@pytest.mark.parametrize("name", ["decode", "generate"])
def test_a_step_is_kernels_that_work_on_the_cache_in_place(lowered, name):
    graph = lowered[name]
    for kernel, first in (("append_step_kernel", 0), ("decode_attention_kernel", 1)):
        launches = calls(graph, kernel)
        assert len(launches) == LAYERS
        for index, arguments in enumerate(launches):
            state = arguments[first : first + len(LayerState._fields)]
            assert all(map(is_input, state[:COUNTS]))
            # A model called directly makes its mask from the first layer's old counts, maybe after their change.
            assert is_input(state[COUNTS]) or (name == "decode" and index == 0)
    assert len(calls(graph, "combine_kernel")) == LAYERS
    others = {called for called, _ in graph["calls"] if not called.startswith("triton_")}
    assert others <= STEP | {"mm", "bmm", "copy_if_misaligned"}


def test_a_step_makes_nothing_as_long_as_the_cache(lowered):
    """But the mask, once for all layers, where the model has to make it; a number per token, never keys or values."""
    assert lowered["decode"]["as long as the cache"] == [[[1, 1, 1, CAPACITY], "bool"]]
    assert lowered["generate"]["as long as the cache"] == []


@pytest.mark.parametrize("name", ["decode", "generate"])
def test_rope_and_norms_are_fused_around_the_kernels(lowered, name):
    """From an append to the next layer's: queries, attention, two norms, the MLP, the next keys. No copy between."""
    called = [call for call, _ in lowered[name]["calls"]]
    last = len(called) - called[::-1].index("append_step_kernel")
    rest = [call for call in called[last:] if call.startswith("triton_")]
    written_back = int(name == "decode" and called[-1].startswith("triton_poi"))  # the first layer's counts
    assert len(rest) - written_back == 4  # RoPE of the query, norm, activation, last norm


def test_a_compiled_prompt_appends_with_four_kernels_and_attends_to_what_is_exact(lowered):
    for kernel in PROMPT:
        assert len(calls(lowered["prefill"], kernel)) == LAYERS
    assert not calls(lowered["prefill"], "decode_attention_kernel")
    assert lowered["prefill"]["as long as the cache"] == []


def test_a_generated_token_reads_nothing_from_the_device_for_the_cache(lowered):
    """generate() itself waits for the device once a token or so; a packed cache adds nothing to that."""
    static, packed = (lowered["host reads"][name]["files"][2:] for name in ("static", "packed"))
    assert len(packed) == 2
    assert not [file for step in packed for file in step if "innerq_compile" in file]
    assert list(map(len, packed)) == list(map(len, static))


def test_a_generated_token_sends_lengths_to_the_host_that_nobody_waits_for(lowered):
    """One with the mask and one with the first layer at most, and not one per layer."""
    assert set(lowered["host reads"]["packed"]["copies"]) == {1, 2}
    assert set(lowered["host reads"]["static"]["copies"]) == {0}


def test_a_full_cache_is_refused_before_its_graph_runs(lowered):
    """Beside the graph and not in it: the launches above are all there is, each with the capacity that it marks by."""
    assert "model.layers.0.self_attn: InnerQ cache is full: it holds 4096 tokens, 1 more" in lowered["full"]
    for kernel in STEP - {"combine_kernel"}:
        assert all(str(CAPACITY) in arguments for arguments in calls(lowered["decode"], kernel))


def test_no_kernel_ends_the_comment_in_which_a_package_quotes_it():
    """AOTInductor writes the source of each kernel into its C++ between /* and */."""
    folder = Path(__file__).resolve().parent.parent / "kernels" / "triton"
    assert not [path.name for path in folder.glob("*.py") if "*/" in path.read_text(encoding="utf-8")]
