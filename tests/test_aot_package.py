"""A model with a packed cache as an AOTInductor package: exported, fused, compiled, loaded, run token by token."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from innerq_compile import InnerQCache, ops
from innerq_compile.compiler.backend import cpp_compiler_works, register_kernels
from innerq_compile.numerics.layout import QUANTIZED, LayerState
from innerq_compile.passes.decode import run_passes

CAPACITY, PROMPT, STEPS = 256, 150, 20
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not cpp_compiler_works(), reason="needs a C++ compiler")]


class Step(nn.Module):
    """A model's step over buffers that come as inputs and are changed in place."""

    def __init__(self, model: nn.Module, cache: InnerQCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, tokens, states):
        for layer, state in zip(self.cache.layers, states, strict=True):
            layer.state = LayerState(*state)
        return self.model(tokens, past_key_values=self.cache).logits


def copies(states):
    return [[buffer.clone() for buffer in state] for state in states]


def decode(step, token, states):
    tokens = []
    with torch.no_grad():
        for _ in range(STEPS):
            token = step(token, states)[:, -1:].argmax(-1)
            tokens.append(int(token))
    return tokens


@pytest.fixture(scope="module")
def package_path(tmp_path_factory):
    return str(tmp_path_factory.mktemp("package") / "step.pt2")


@pytest.fixture
def prompted(tiny_config, make_model):
    tiny_config.num_hidden_layers = 1
    tiny_config.initializer_range = 0.2  # the default makes a random model repeat one token
    model = make_model(tiny_config)
    cache = InnerQCache(tiny_config, max_cache_len=CAPACITY)
    ids = torch.randint(1, 256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    return Step(model, cache), token, [list(layer.state) for layer in cache.layers]


@pytest.mark.long
def test_a_package_decodes_the_model_s_tokens_and_moves_the_cache_on(prompted, package_path):
    step, token, states = prompted
    eager, packaged = copies(states), copies(states)
    with torch.no_grad():
        program = torch.export.export(step, (token, copies(states)), strict=False)
    report = run_passes(program.graph_module, exact=True)
    assert (report.rewritten, report.refused) == (1, 0)
    assert not program.graph.find_nodes(op="call_function", target=ops.dequantize_kv)
    register_kernels()
    torch._inductor.aoti_compile_and_package(program, package_path=package_path, inductor_configs=QUICK)
    loaded = torch._inductor.aoti_load_package(package_path)
    tokens = decode(step, token, eager)
    assert len(set(tokens)) > STEPS // 3
    assert decode(loaded, token, packaged) == tokens
    for name, x, y in zip(LayerState._fields, eager[0], packaged[0], strict=True):
        if name in ("k_codes", "v_codes", "counts"):
            assert torch.equal(x, y), name
    assert packaged[0][-1][0, QUANTIZED] == 32


@pytest.mark.long
def test_a_package_says_which_ops_are_missing_where_this_project_is_not_imported(package_path):
    """On a CPU it calls ops, and the cache that it works on comes from InnerQCache anyway."""
    program = f"import torch; torch._inductor.aoti_load_package({package_path!r})"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert "Could not find schema for innerq::append_kv" in done.stderr
    program = f"from innerq_compile import InnerQCache; {program}"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
