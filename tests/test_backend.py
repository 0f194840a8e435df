"""The backend from the outside: how it is reached, what it accepts, what Inductor makes of the rewritten graph."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from innerq_compile import InnerQCache, ops
from innerq_compile.compiler import backend
from innerq_compile.numerics.layout import LayerState
from innerq_compile.passes.decode import run_passes

CAPACITY = 480
PROMPT = 20


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that has imported nothing of ours."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def prompt(batch: int = 1, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prefilled(tiny_model, tiny_config):
    """A tiny Llama and a cache that holds its prompt; the prompt ran uncompiled."""
    torch._dynamo.reset()
    cache = InnerQCache(tiny_config, max_cache_len=CAPACITY)
    with torch.no_grad():
        tiny_model(prompt(), past_key_values=cache)
    return tiny_model, cache


class TestReach:
    def test_entry_point_names_the_backend(self):
        done = run_python("import torch; print(torch._dynamo.list_backends())")
        assert "'innerq'" in done.stdout

    @pytest.mark.slow
    def test_name_resolves_in_a_fresh_process(self):
        done = run_python(
            "import sys, torch\n"
            "assert 'innerq_compile' not in sys.modules\n"
            "double = torch.compile(lambda x: 2 * x, backend='innerq')\n"
            "assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))\n"
            "print('innerq_compile.compiler.backend' in sys.modules, 'transformers' in sys.modules)"
        )
        assert done.stdout.split() == ["True", "False"]

    def test_import_is_cheap(self):
        done = run_python(
            "import sys, innerq_compile.compiler.backend\n"
            "print([m for m in ('transformers', 'triton', 'torch._inductor.compile_fx') if m in sys.modules])"
        )
        assert done.stdout.strip() == "[]"


class TestOptions:
    def test_own_and_inductor_options_are_told_apart(self):
        own, inductor = backend.split_options({"exact": True, "triton.cudagraphs": False, "max-autotune": True})
        assert own == {"fuse": True, "exact": True, "key_norm": "runtime", "static_cache": "base", "fold_id": 0}
        assert inductor == {"triton.cudagraphs": False, "max_autotune": True}

    def test_unknown_option_is_refused_by_name(self):
        own = r"\['exact', 'fuse', 'key_norm', 'static_cache'\]"
        with pytest.raises(ValueError, match=rf"unknown options \['bits'\].*own are {own}.*_inductor.config"):
            backend.split_options({"bits": 3})

    @pytest.mark.parametrize("value", [1, None, "yes"])
    def test_own_option_must_be_a_bool(self, value):
        with pytest.raises(ValueError, match="option 'fuse' must be True or False, got"):
            backend.split_options({"fuse": value})

    @pytest.mark.parametrize("value", [True, "off", None])
    def test_key_norm_is_at_run_time_or_folded(self, value):
        with pytest.raises(ValueError, match="option 'key_norm' must be runtime or folded, got"):
            backend.split_options({"key_norm": value})

    def test_unknown_option_is_refused_through_torch_compile(self):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: x + 1, backend="innerq", options={"fuze": False})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"unknown options \['fuze'\]"):
            compiled(torch.ones(2))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "keywords", [{"mode": "reduce-overhead"}, {"options": {"epilogue_fusion": False}}], ids=str
    )
    def test_mode_and_inductor_options_are_accepted(self, keywords):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: x.sin() + 1, backend="innerq", **keywords)
        x = torch.arange(4.0)
        assert torch.allclose(compiled(x), x.sin() + 1)

    @pytest.mark.parametrize(("options", "fused"), [({}, [False]), ({"exact": True}, [True]), ({"fuse": False}, [])])
    def test_own_options_reach_the_graph(self, prefilled, options, fused, monkeypatch):
        model, cache = prefilled
        seen = []
        monkeypatch.setattr(backend, "_needs_cpp_compiler", lambda inputs: True)
        monkeypatch.setattr(backend, "cpp_compiler_works", lambda: False)

        def record(gm, example_inputs):
            run = backend.innerq(gm, example_inputs, options=options)
            seen.extend(node.args[-1] for node in gm.graph.nodes if node.target is ops.decode_attention)
            return run

        with torch.no_grad():
            torch.compile(model, backend=record)(prompt(length=1), past_key_values=cache)
        assert seen == fused * model.config.num_hidden_layers


NO_COMPILER = """
import torch
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import allocate_state
config = InnerQConfig()
shape = dict(batch_size=1, num_kv_heads=2, head_dim=32, capacity=64, dtype=torch.float32, device="cpu")
append, dequantize = torch.ops.innerq.append_kv, torch.ops.innerq.dequantize_kv

def step(q, k, v, mask, state):
    append(k, v, *state, 64, config.spec)
    keys, values = dequantize(*state, 64, config.spec)
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

q, k, v = torch.randn(3, 1, 2, 1, 32).unbind()
mask = (torch.arange(64) < 1)[None, None, None]
expected = step(q, k, v, mask, allocate_state(config, **shape))
for _ in range(2):
    torch._dynamo.reset()
    got = torch.compile(step, backend="innerq", fullgraph=True)(q, k, v, mask, allocate_state(config, **shape))
    assert torch.allclose(got, expected, atol=1e-6), (got - expected).abs().max()
"""


class TestWithoutCompiler:
    @pytest.fixture(params=["absent", "broken"])
    def compiler(self, request, tmp_path: Path) -> str:
        if request.param == "absent":
            return str(tmp_path / "no-such-compiler")
        script = tmp_path / "broken-compiler"
        script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ (fake) 12.0"\n')
        script.chmod(0o755)
        return str(script)

    @pytest.mark.slow
    def test_warns_once_and_is_right(self, compiler, tmp_path):
        code = "import innerq_compile.ops\n" + NO_COMPILER
        done = run_python(code, CXX=compiler, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        assert done.stderr.count("no working C++ compiler") == 1, done.stderr
        assert "CXX" in done.stderr


needs_compiler = pytest.mark.skipif(not backend.cpp_compiler_works(), reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.slow
def test_decode_step_is_one_graph_without_copies_and_never_recompiles(prefilled):
    model, cache = prefilled
    step = torch.compile(model, backend="innerq", fullgraph=True, options={"fx_graph_cache": False})
    token = prompt(length=1)
    with torch.no_grad():
        _, [code] = run_and_get_code(step, token, past_key_values=cache)
        flushed = []
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(300):
                token = step(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                flushed.append(int(cache.layers[0].state.counts[0, 1]))
    assert len(set(flushed)) >= 5 and int(cache.get_seq_length()) == PROMPT + 301
    assert code.count("torch.ops.innerq.append_kv.default(") == model.config.num_hidden_layers
    assert code.count("torch.ops.innerq.decode_attention.default(") == model.config.num_hidden_layers
    assert "dequantize_kv" not in code
    assert_state_is_passed_by_reference(code)


def assert_state_is_passed_by_reference(code: str) -> None:
    """Every buffer that the ops of generated code take is an input of the graph, never a fresh copy.

    All but ``counts``, three numbers a row: Inductor copies those of the layer whose length makes the positions,
    because it drops the ``clone`` between reading that length and changing it.
    """
    calls = [(ast.unparse(node.func), node.args) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    ours = [(name.split(".")[-2], arguments) for name, arguments in calls if name.startswith("torch.ops.innerq.")]
    assert ours
    for name, arguments in ours:
        first = {"append_kv": 2, "decode_attention": 1}[name]
        state = [ast.unparse(argument) for argument in arguments[first : first + LayerState._fields.index("counts")]]
        assert all(re.fullmatch(r"arg\d+_1", buffer) for buffer in state), f"{name} takes {', '.join(state)}"


def test_no_keys_or_values_of_cache_length_after_fusing(prefilled):
    model, cache = prefilled
    layers, head_dim = model.config.num_hidden_layers, model.config.head_dim
    counts = []

    def whole_tensors(gm):
        values = [node.meta.get("example_value") for node in gm.graph.nodes]
        return sum(
            isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[-2:] == (CAPACITY, head_dim)
            for x in values
        )

    def record(gm, example_inputs):
        counts.append(whole_tensors(gm))
        report = run_passes(gm)
        counts.append(whole_tensors(gm))
        assert [site.path for site in report.sites] == [f"model.layers.{i}.self_attn" for i in range(layers)]
        assert report.rewritten == layers
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=record, fullgraph=True)(prompt(length=1), past_key_values=cache)
    before, after = counts
    assert before >= 2 * layers and after == 0


def family(config_class, **more):
    return config_class(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,  # the default makes a random model repeat one token
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )


FAMILIES = {
    "llama": lambda: family(LlamaConfig),
    "qwen2": lambda: family(Qwen2Config),
    "qwen3": lambda: family(Qwen3Config),
    "mistral": lambda: family(MistralConfig, sliding_window=None),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_and_eager_generate_the_same_tokens(name, make_model):
    torch._dynamo.reset()
    model = make_model(FAMILIES[name]())
    # On a CPU generate() compiles its decode steps only when it is told to.
    compiled = CompileConfig(backend="innerq", mode=None, options={"exact": True}, fullgraph=True)
    compiled._compile_all_devices = True

    def generate(**keywords):
        cache = InnerQCache(model.config, max_cache_len=CAPACITY)
        assert not cache.unquantized
        ids = prompt()
        return model.generate(ids, past_key_values=cache, max_new_tokens=300, do_sample=False, **keywords)

    expected = generate(disable_compile=True)
    got = generate(compile_config=compiled)
    assert len(expected[0, PROMPT:].unique()) > 20, "the random model repeats itself: the test shows nothing"
    assert torch.equal(got, expected)
