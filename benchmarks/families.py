"""A tiny random model of every causal family that transformers knows.

One rule makes them from the defaults of their configurations: a number that says how large a model is becomes small, by
its name; a list with an entry per layer keeps one layer of each kind; everything that says how a model works stays. A
few families need sizes that fit each other in a way that no name tells, or have no defaults that work: ``SPECIAL``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
MOST_LAYERS = 6

SIZES: dict[str, int] = {
    name: size
    for size, names in (
        (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"),
        (LAYERS, "num_encoder_layers num_blocks num_mem_blocks encoder_num_hidden_layers"),
        (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
        (HEADS, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"),
        (HEADS, "linear_num_heads linear_num_key_heads linear_num_value_heads index_n_heads"),
        (HEADS * HEAD_DIM, "hidden_size d_model n_embd dim_model emb_dim embedding_size embedding_dim lru_width"),
        (HEADS * HEAD_DIM, "word_embed_proj_dim attention_hidden_size ple_embed_dim hidden_size_global"),
        (HEAD_DIM, "head_dim dim_head v_head_dim qk_nope_head_dim qk_rope_head_dim qk_head_dim swa_head_dim d_head"),
        (HEAD_DIM, "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim attention_head_size"),
        (HEAD_DIM, "q_lora_rank kv_lora_rank adapter_rank laurel_rank hidden_size_per_layer_input hc_lowrank"),
        (HEAD_DIM // 2, "rotary_dim"),
        (64, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dim_ff d_inner feed_forward_size"),
        (64, "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
        (64, "dense_intermediate_size shared_intermediate_size shared_experts_intermediate_size"),
        (64, "moe_shared_expert_intermediate_size"),
        (256, "vocab_size vocab_size_per_layer_input"),
        (512, "encoder_hash_byte_group_vocab ngram_vocab_size_base"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
        (
            2,
            "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts n_group num_expert_group",
        ),
        (1, "topk_group"),
        (64, "sliding_window sliding_window_size attention_window_size window_size local_attention"),
        (16, "mamba_d_state ssm_state_size state_size"),
    )
    for name in names.split()
}
"""Names of sizes, and what they may be at most."""

FIXED: dict[str, Any] = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"), 1024),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": False,  # a random model with tied ones repeats its input
    "initializer_range": 0.2,  # the default makes a random model repeat one token
    "init_std": 0.2,
    "is_decoder": True,
    "hidden_dropout_prob": 0.0,
    "num_kv_shared_layers": 0,
}
"""What every configuration says that has a word for it."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32}
_GEMMA4 = {"per_layer_config": {"1": {"head_dim": 64}}}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, "indexer_budget": 256}
_QWEN4 |= {"indexer_compress_ratio": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 128}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 128, "adapter_out_dim": 128},
        "audio_config": {"adapter_input_size": 128, "adapter_out_dim": 128},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 256},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "longcat_flash": {"qk_head_dim": 2 * HEAD_DIM},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [32, 32], "axial_pos_embds_dim": [64, 64]},
    "xlnet": {"d_head": HEAD_DIM},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 256, "attention_head_dim": 64},
    "zamba2": {
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
        "mamba_headdim": HEAD_DIM,
        "hybrid_layer_ids": [1],
    },
}
"""Model type -> settings that the general rule does not find."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a tiny model: about a million parameters, a layer of each kind."""
    return _shrunk(CONFIG_MAPPING[model_type](), SPECIAL.get(model_type, {}))


def make_model(config: PreTrainedConfig, **chosen: Any) -> PreTrainedModel:
    """A model of random float32 weights, the same ones each time, that no token stops."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _shrunk(config: PreTrainedConfig, special: Mapping[str, Any]) -> PreTrainedConfig:
    given = config.to_dict()
    num_layers = next((given[name] for name in SIZES if name in given and SIZES[name] == LAYERS), 0)
    kept = _one_layer_of_each_kind(given, num_layers)
    settings = {name: _small(name, value, kept, num_layers) for name, value in given.items()}
    heads = given.get("num_attention_heads") or given.get("n_head")
    for name in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"):
        if isinstance(given.get(name), int):
            settings[name] = HEADS if given[name] == heads else KV_HEADS
    for name in (*_META, "per_layer_config"):
        settings.pop(name, None)
    for name in config.sub_configs:
        if isinstance(config.__dict__.get(name), PreTrainedConfig):
            settings[name] = _shrunk(config.__dict__[name], special.get(name, {}))
        settings.update({key: value for key, value in special.items() if key not in config.sub_configs})
    settings.update(
        {key: value for key, value in special.items() if not isinstance(settings.get(key), PreTrainedConfig)}
    )
    return type(config)(**settings)


_META = ("transformers_version", "architectures", "model_type", "dtype", "torch_dtype", "_name_or_path")


def _small(name: str, value: Any, kept: list[int], num_layers: int) -> Any:
    if name in FIXED:
        return FIXED[name]
    if isinstance(value, list) and len(value) == num_layers > 0:
        return [_small(name, value[index], kept, num_layers) for index in kept]
    if name in SIZES and SIZES[name] == LAYERS and name != "topk_group" and value == num_layers:
        return len(kept)
    if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
        return min(SIZES[name], value)
    return value


def _one_layer_of_each_kind(given: Mapping[str, Any], num_layers: int) -> list[int]:
    per_layer = [value for value in given.values() if isinstance(value, list) and len(value) == num_layers > 0]
    kinds = {str(kind): index for index, kind in reversed(list(enumerate(zip(*per_layer, strict=True))))}
    kept = sorted(kinds.values())[:MOST_LAYERS]
    return kept if len(kept) >= LAYERS else list(range(min(LAYERS, num_layers)))
