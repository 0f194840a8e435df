"""Folding the key norm: which models, how exactly, what is refused, and what a cache makes of it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import fx, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from innerq_compile import InnerQCache, enable, fold_key_norm, ops
from innerq_compile.cache.mark import CONFIG_KEY, check_folded
from innerq_compile.key_norm.fold import KeyNormFold
from innerq_compile.passes.decode import run_passes
from innerq_compile.passes.key_norm.fold_captured import fold_captured
from innerq_compile.passes.key_norm.trace_projections import FoldRefused

COMMON = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT = {"vocab_size": 128, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
MHA = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}

# Name -> configuration class, its arguments, and how RoPE ties the 32 channels of a head (None: not at all).
HALVES = [(i, i + 16) for i in range(16)]
MODELS = {
    "llama": ("LlamaConfig", {**COMMON, "head_dim": 32}, HALVES),
    "mistral": ("MistralConfig", {**COMMON, "head_dim": 32, "sliding_window": 64}, HALVES),
    "qwen2": ("Qwen2Config", COMMON, HALVES),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 32}, HALVES),
    "phi3": ("Phi3Config", {**COMMON, "partial_rotary_factor": 0.5}, [(i, i + 8) for i in range(8)]),
    "gpt2": ("GPT2Config", {**GPT, "bos_token_id": 0, "eos_token_id": 0}, []),
    "gpt_neox": ("GPTNeoXConfig", {**MHA, "rotary_pct": 0.25}, [(i, i + 4) for i in range(4)]),
    "opt": ("OPTConfig", {**MHA, "ffn_dim": 64, "word_embed_proj_dim": 128}, []),
    "stablelm": ("StableLmConfig", {**COMMON, "use_qkv_bias": True}, [(i, i + 4) for i in range(4)]),
    "stablelm_head_norm": ("StableLmConfig", {**COMMON, "qk_layernorm": True}, [(i, i + 4) for i in range(4)]),
    "gemma3": ("Gemma3TextConfig", {**COMMON, "head_dim": 32}, HALVES),
    "glm": ("GlmConfig", {**COMMON, "head_dim": 32}, [(2 * i, 2 * i + 1) for i in range(8)]),
    "cohere": ("CohereConfig", COMMON, [(2 * i, 2 * i + 1) for i in range(16)]),
    "cohere_head_norm": ("CohereConfig", {**COMMON, "use_qk_norm": True}, [(2 * i, 2 * i + 1) for i in range(16)]),
    "olmo2": ("Olmo2Config", COMMON, HALVES),
}
SHARED_HEADS = {"qwen3", "gemma3"}  # one norm weight for all heads of a layer

PAPER = {"statistic": "max", "strength": 0.5, "query_strength": 0.0}

TOKENS = torch.randint(1, 128, (3, 40), generator=torch.Generator().manual_seed(1))


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kind, arguments, _ = MODELS[name]
    return randomized(getattr(transformers, kind)(**arguments), dtype)


def randomized(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model whose biases and norms are not those of a fresh one, with a few loud channels."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def fold(model: nn.Module, **settings: object) -> KeyNormFold:
    return fold_key_norm(model, TOKENS, progress=False, **settings)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits.double()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not hasattr(model, "config") or not hasattr(model.config, CONFIG_KEY)


@pytest.mark.parametrize("name", MODELS)
def test_folding_changes_no_output_and_is_undone_bit_for_bit(name: str) -> None:
    model = build(name)
    before, expected = state(model), logits(model)
    handle = fold(model)
    assert len(handle.factors) == 2
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    error = float((logits(model) - expected).abs().max() / expected.abs().max())
    assert error <= 1e-5  # a few roundings of float32 through two layers; the issue allows 1e-4
    assert handle.error <= handle.budget <= 1e-4
    handle.restore()
    assert_untouched(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_factors_are_tied_where_channels_mix_and_only_there(name: str) -> None:
    handle = fold(build(name))
    pairs = MODELS[name][2]
    for factors in handle.factors.values():
        for head in factors:
            for a, b in pairs:
                assert head[a] == head[b]
            assert len(head.unique()) == 32 - len(pairs)
        assert torch.equal(factors[0], factors[-1]) == (name in SHARED_HEADS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_powers_of_two_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    expected = logits(model)
    assert fold(model, power_of_two=True).error == 0
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_16_bit_weights_stay_within_one_rounding(name: str) -> None:
    handle = fold(build(name, torch.bfloat16))
    assert 0 < handle.error <= handle.budget


def test_keys_that_reach_the_cache_are_divided_by_the_factor() -> None:
    model, ids = build("llama"), TOKENS.reshape(1, -1)  # calibration is read as one stream
    before = model(ids).past_key_values.layers[1].keys
    handle = fold(model, **PAPER)
    after = model(ids).past_key_values.layers[1].keys
    factor = handle.factors["model.layers.1.self_attn"].float()
    torch.testing.assert_close(after * factor[None, :, None], before, rtol=1e-4, atol=1e-5)
    # The published factor makes the loudest moment of a pair the square root of what it was; sink tokens do not count.
    loudest = before[:, :, 30:].abs().amax((0, 2)).view(2, 2, 16).amax(1).repeat(1, 2)
    torch.testing.assert_close(factor, loudest.sqrt(), rtol=1e-3, atol=0)


def test_saved_and_loaded_model_is_ordinary_and_known_as_folded(tmp_path) -> None:
    model = build("llama")
    expected = logits(model)
    handle = fold(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    check_folded(loaded)
    assert InnerQCache(loaded.config).config.key_norm == "folded"
    assert InnerQCache(loaded.config, key_norm="runtime").config.key_norm == "runtime"
    handle.restore()
    assert InnerQCache(model.config).config.key_norm == "runtime"


def test_mark_with_other_weights_is_an_error(tmp_path) -> None:
    model = build("llama")
    handle = fold(model)
    handle.originals["model.layers.0.self_attn.k_proj.weight"]  # a parameter that was changed
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match=r"belongs to other weights: .*k_proj.weight"):
        check_folded(model)


def test_folded_cache_for_a_model_that_is_not_is_an_error() -> None:
    with pytest.raises(ValueError, match="call innerq_compile.fold_key_norm"):
        InnerQCache(build("llama").config, key_norm="folded")


def test_saved_factors_fold_the_same_model_again_and_no_other(tmp_path) -> None:
    model = build("llama")
    handle = fold(model)
    folded = state(model)
    handle.save(tmp_path)
    handle.restore()
    fold(model, factors=tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, folded[name], rtol=1e-6, atol=0)
    other = build("llama")
    other.model.layers[1].self_attn.q_proj.weight.data.mul_(2.0)
    with pytest.raises(ValueError, match="other weights"):
        fold(other, factors=tmp_path)
    with pytest.raises(ValueError, match="another model"):
        fold(build("gpt2"), factors=tmp_path)
    with pytest.raises(FoldRefused, match="1 other layers"):
        fold(build("llama"), factors={"model.layers.0.self_attn": torch.ones(2, 32)})


def test_folded_cache_equals_normalizing_at_run_time() -> None:
    """On prompts that calibrated the model, quantized keys differ only by the tie of RoPE pairs; windows not at all."""
    model = build("llama")
    ids = TOKENS.reshape(1, -1)
    expected = model(ids, past_key_values=InnerQCache(model.config, recent=32, sink=0)).logits
    fold(model)
    cache = InnerQCache(model.config, recent=32, sink=0)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-5)
    assert "key_norm=folded" in cache.layers[0].spec
    assert torch.equal(cache.layers[0].state.key_norm, torch.ones(1, 2, 32))


def test_settings_shape_the_factors() -> None:
    model = build("llama")
    found = {}
    for settings in ({}, {"strength": 0.25}, {"statistic": "rms"}, {"power_of_two": True}, {"off_below": 1e9}):
        try:
            handle = fold(model, **{**PAPER, **settings})
            found[json.dumps(settings)] = handle.factors["model.layers.0.self_attn"]
            handle.restore()
        except FoldRefused:
            found[json.dumps(settings)] = None
    base = found["{}"]
    torch.testing.assert_close(found['{"strength": 0.25}'], base.sqrt())
    assert (found['{"statistic": "rms"}'] < base).all()
    assert torch.equal(found['{"power_of_two": true}'], torch.exp2(base.log2().round()))
    assert torch.equal(found['{"off_below": 1000000000.0}'], torch.ones(2, 32, dtype=torch.float64))


@pytest.mark.parametrize("settings", [{"strength": 1.0, "query_strength": 0.0}, {}])
def test_full_strength_undoes_any_exchange_between_keys_and_queries(settings: dict[str, float]) -> None:
    scale = torch.tensor([1.0, 64.0, 4.0] + [1.0] * 13).repeat(1, 2).repeat(2, 1)
    plain, loud = build("llama"), build("llama")
    for layer in loud.model.layers:
        layer.self_attn.k_proj.weight.data *= scale.reshape(-1, 1)
        layer.self_attn.q_proj.weight.data /= scale.repeat_interleave(2, 0).reshape(-1, 1)
    fold(plain, **settings)
    fold(loud, **settings)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(loud.get_parameter(name), parameter, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistic": "mean"}, "statistic"),
        ({"strength": 2.0}, "strength"),
        ({"query_strength": -1.0}, "query_strength"),
        ({"off_below": -1.0}, "off_below"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold(build("llama"), **settings)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "no tokens"), (torch.ones(3), "token ids"), (3, "token ids"), (TOKENS[0, :4], "at least 8 tokens")],
)
def test_bad_calibration_is_refused(calibration: object, message: str) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fold_key_norm(model, calibration, progress=False)
    assert_untouched(model, before)


def test_every_form_of_calibration_gives_the_same_factors() -> None:
    padded = {"input_ids": F.pad(TOKENS, (4, 0)), "attention_mask": F.pad(torch.ones_like(TOKENS), (4, 0))}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TOKENS), batch_size=2)
    forms = [TOKENS, TOKENS.flatten(), TOKENS.flatten().tolist(), list(TOKENS), TOKENS.tolist(), padded, loader]
    model, factors = build("llama"), []
    for form in forms:
        handle = fold_key_norm(model, form, progress=False)
        factors.append(handle.factors["model.layers.1.self_attn"])
        handle.restore()
    assert all(torch.equal(factor, factors[0]) for factor in factors)


class Attention(nn.Module):
    """Heads of one token mixer, with one thing of your choice in it."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 64)
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.out = nn.Linear(64, 64)
        self.change = change
        self.lora_a, self.lora_b = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
        if change == "tied":
            self.q.weight = self.k.weight
        if change == "tied_elsewhere":
            self.out.weight = self.k.weight
        if change == "overlap":
            both = torch.randn(96, 64) / 8
            self.k.weight, self.out.weight = nn.Parameter(both[:64]), nn.Parameter(both[32:])
        if change == "quantized":
            self.register_buffer("codes", torch.randint(-8, 8, (64, 64), dtype=torch.int8))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(input_ids))
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.change == "lora":
            k = k + 2.0 * self.lora_b(self.lora_a(x))
        if self.change == "quantized":
            k = F.linear(x, self.codes * 0.02)
        if self.change == "weight_norm":
            k = F.linear(x, self.k.weight / self.k.weight.norm(dim=1, keepdim=True))
        if self.change == "branch" and bool(k.sum() > 0):
            k = -k
        if self.change == "nonlinear":
            k = torch.tanh(k)
        if self.change == "unweighted_norm":
            k = F.normalize(k.unflatten(2, (2, 32)), dim=-1).flatten(2)
        if self.change == "keys_are_values":
            v = k
        heads = [t.unflatten(2, (2, 32)).transpose(1, 2) for t in (q, k, v)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        if self.change == "gate":
            attended = attended * k.sigmoid()
        if self.change == "query_again":
            attended = attended + heads[0].transpose(1, 2).flatten(2)
        return self.out(attended) @ self.embed.weight.T


@pytest.mark.parametrize("change", ["", "lora"])
def test_plain_module_is_folded(change: str) -> None:
    model = Attention(change)
    before, expected = state(model), model(TOKENS % 64)
    handle = fold_key_norm(model, TOKENS % 64, progress=False)
    torch.testing.assert_close(model(TOKENS % 64), expected, rtol=1e-4, atol=1e-5)
    assert ("lora_b.weight" in handle.originals) == (change == "lora")
    assert not torch.equal(model.k.weight, before["k.weight"])
    handle.restore()
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("tied", r"k.weight scales keys and queries alike|q.weight scales keys and queries alike"),
        ("tied_elsewhere", "tied weights"),
        ("overlap", "shares its memory with out.weight"),
        ("quantized", "no parameter but torch.float32 mul: quantized, or computed"),
        ("weight_norm", "a weight is computed in the graph by div"),
        ("nonlinear", "not linear: .*tanh"),
        ("unweighted_norm", "not linear: "),
        ("keys_are_values", "values|also reads the channels"),
        ("gate", "sigmoid also reads the channels|keys also go to"),
        ("query_again", "the queries also go to transpose"),
        ("branch", "torch.export cannot capture the model: "),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(change: str, reason: str) -> None:
    model = Attention(change)
    before = state(model)
    with pytest.raises(FoldRefused, match=reason):
        fold_key_norm(model, TOKENS % 64, progress=False)
    assert_untouched(model, before)


LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
NO_SDPA = "no scaled_dot_product_attention in the graph: the model computes its scores itself"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.GPTJConfig(**GPT, rotary_dim=16, bos_token_id=0, eos_token_id=0), NO_SDPA),
        (transformers.GptOssConfig(**COMMON, head_dim=32, num_local_experts=4, num_experts_per_tok=2), NO_SDPA),
        (
            transformers.DeepseekV3Config(**{**COMMON, "num_key_value_heads": 4}, **LATENT, **EXPERTS),
            r"self_attn, model.layers.1.self_attn: the keys are assembled in place, as latent attention",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_model_whose_attention_has_no_foldable_keys_is_refused(config: PreTrainedConfig, reason: str) -> None:
    model = randomized(config)
    before, expected, attention = state(model), logits(model), model.config._attn_implementation
    with pytest.raises(FoldRefused, match=reason):
        fold(model)
    assert_untouched(model, before)
    assert torch.equal(logits(model), expected)
    assert model.config._attn_implementation == attention


def test_eager_model_is_folded_through_sdpa_and_stays_eager() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    expected = logits(model)
    fold(model)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_training_model_is_folded_and_keeps_training() -> None:
    model = build("llama").train()
    fold(model)
    assert model.training


def test_folding_twice_is_refused() -> None:
    model = build("llama")
    fold(model)
    with pytest.raises(FoldRefused, match="folded already"):
        fold(model)


def test_meta_weights_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))
    with pytest.raises(FoldRefused, match="meta device"):
        fold(model)


def test_tensor_subclass_is_refused() -> None:
    class Shard(torch.Tensor):
        pass

    model = build("llama")
    weight = model.model.layers[0].self_attn.k_proj.weight
    model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(weight.data.as_subclass(Shard))
    with pytest.raises(FoldRefused, match=r"k_proj.weight is a Shard: quantized weights and shards"):
        fold(model)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (TOKENS,), {"use_cache": False}, strict=False)


def test_exported_program_gets_new_constants_and_leaves_the_model_alone() -> None:
    model = build("qwen2")
    before, program = state(model), exported(model)
    expected = program.module()(TOKENS, use_cache=False).logits
    handle = fold_key_norm(program, [(TOKENS,)], progress=False)
    folded = program.module()(TOKENS, use_cache=False).logits
    assert not torch.equal(folded, expected)  # rounding: the constants did change
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)
    handle.restore()
    assert torch.equal(program.module()(TOKENS, use_cache=False).logits, expected)


def test_graph_module_is_folded_in_place() -> None:
    gm = exported(build("phi3")).module()
    before, expected = state(gm), gm(TOKENS, use_cache=False).logits
    handle = fold_key_norm(gm, [(TOKENS,)], progress=False)
    torch.testing.assert_close(gm(TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(state(gm)[next(iter(handle.originals))], before[next(iter(handle.originals))])
    handle.restore()
    assert_untouched(gm, before)


class TestCompiled:
    """The same inside torch.compile, with the first prompt as calibration."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def generate(model: PreTrainedModel, length: int | None = None, **settings: object) -> torch.Tensor:
        cache = InnerQCache(model.config, max_cache_len=256, sink=0, recent=32, **settings)
        prompt = TOKENS.reshape(1, -1)[:, :length]
        out = model.generate(
            prompt,
            max_new_tokens=40,
            do_sample=False,
            past_key_values=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(out.logits)

    @staticmethod
    def compile_recording(model: PreTrainedModel) -> list[fx.GraphModule]:
        """Compiles with the passes alone and keeps their graphs."""
        graphs = []

        def backend(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
            fold_captured(gm, example_inputs)
            run_passes(gm)
            graphs.append(gm)
            return gm.forward

        model.compile(backend=backend)
        return graphs

    def test_first_prompt_folds_and_every_graph_knows(self) -> None:
        model = build("llama")
        before, expected = state(model), self.generate(model, key_bits=8)
        graphs = self.compile_recording(model)
        found = self.generate(model, key_bits=8)
        assert not torch.equal(
            model.model.layers[0].self_attn.k_proj.weight, before["model.layers.0.self_attn.k_proj.weight"]
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
        specs = [spec for gm in graphs for node in gm.graph.nodes for spec in node.args if "key_norm=" in str(spec)]
        assert len(graphs) == 2
        assert len(specs) == 2 + 4  # append_kv in the prompt's graph, append_kv and decode_attention in the other
        assert all("key_norm=folded" in spec for spec in specs)
        folded = state(model)
        self.generate(model)  # another prompt changes nothing any more
        assert all(torch.equal(tensor, folded[name]) for name, tensor in model.state_dict().items())

    def test_short_first_prompt_leaves_folding_to_the_next_with_dynamic_shapes(self, caplog) -> None:
        model, weight = build("llama"), "model.layers.0.self_attn.k_proj.weight"
        before, expected = state(model), [self.generate(model, n, key_bits=8) for n in (5, 90, 70)]
        graphs = self.compile_recording(model)
        found = [self.generate(model, 5, key_bits=8)]
        assert "at least 8 tokens, got 5; innerq_compile.fold_key_norm(model, tokens)" in caplog.text
        assert torch.equal(model.get_parameter(weight), before[weight])
        found += [self.generate(model, n, key_bits=8) for n in (90, 70)]
        assert not torch.equal(model.get_parameter(weight), before[weight])
        assert ["key_norm=folded" in str(gm.graph) for gm in graphs] == [False, False, True]  # 70 compiles nothing more
        for logits_, expected_ in zip(found, expected, strict=True):
            torch.testing.assert_close(logits_, expected_, rtol=0, atol=0.01 * float(expected_.abs().max()))

    def test_folded_decode_graph_is_the_graph_without_any_norm(self) -> None:
        """No multiplication is left: node for node the graph of a cache that does not normalize."""
        decode = []
        for folded in (False, True):
            model = build("llama")
            if folded:
                fold(model)
            torch._dynamo.reset()
            graphs = []
            model.compile(backend=lambda gm, _, graphs=graphs: (run_passes(gm), graphs.append(gm), gm.forward)[-1])
            self.generate(model, **({} if folded else {"key_norm": "off"}))
            decode.append([(n.op, str(n.target)) for n in graphs[-1].graph.nodes])
            spec = next(n.args[-2] for n in graphs[-1].graph.nodes if n.target is ops.decode_attention)
            assert ("key_norm=folded" if folded else "key_norm=off") in spec
        assert decode[0] == decode[1]

    def test_what_cannot_be_folded_keeps_its_norm_and_says_why(self, caplog) -> None:
        model = build("llama")
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight[:64].repeat(2, 1))
            layer.self_attn.k_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight.data[:64])
        before = state(model)
        graphs = self.compile_recording(model)
        self.generate(model)
        assert "the key norm stays at run time: " in caplog.text
        assert "shares its memory" in caplog.text
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert "key_norm=runtime" in str(graphs[-1].graph)

    @pytest.mark.slow
    def test_enable_folds_with_the_first_prompt(self) -> None:
        model, weight = build("llama"), "model.layers.0.self_attn.k_proj.weight"
        before, expected = state(model), self.generate(model, key_bits=8)
        enable(model, key_norm="folded")
        found = self.generate(model, key_bits=8)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
        assert not torch.equal(model.get_parameter(weight), before[weight])

    def test_enable_refuses_a_mark_with_other_weights(self) -> None:
        model = build("llama")
        fold(model)
        model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)
        with pytest.raises(ValueError, match="belongs to other weights"):
            enable(model)


def test_handle_tells_what_was_done() -> None:
    text = str(fold(build("llama")))
    assert "folded into 4 parameters" in text
    assert "model.layers.1.self_attn" in text
