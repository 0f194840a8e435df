"""Models of known shapes with random weights, built without reading or initialising anything that is replaced."""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "1b": {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Llama-3.1-8B, Llama-3.2-1B, and one for dry runs."""


def config_of(name: str) -> LlamaConfig:
    """The configuration; rope parameters are left at their defaults, they change no cost."""
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaConfig(**SHAPES[name], **special, max_position_embeddings=262144)


def weight_bytes(name: str) -> int:
    """Bytes of the weights in 16 bit."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def build(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all weights in one small piece of memory (see :func:`share_weights`)."""
    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    replaced: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in replaced:
                    real = torch.empty(0, dtype=dtype, device=device)
                    replaced[id(parameter)] = torch.nn.Parameter(real, requires_grad=False)
                    replaced[id(parameter)].meta_shape = parameter.shape  # type: ignore[attr-defined]
                module._parameters[key] = replaced[id(parameter)]
    # The one module with buffers; a fresh one computes them on the device.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    share_weights(model)
    return model


def share_weights(model: PreTrainedModel) -> None:
    """Lets all weights overlap in one buffer as large as the largest: enough to compile, and little memory."""
    parameters = list(model.parameters())
    first = parameters[0]
    for parameter in parameters:
        parameter.data = first.new_empty(0)
    largest = max(p.meta_shape.numel() for p in parameters)
    buffer = torch.empty(largest, dtype=first.dtype, device=first.device).normal_(0, 0.02)
    for parameter in parameters:
        parameter.data = buffer[: parameter.meta_shape.numel()].view(parameter.meta_shape)
    _free(first.device)


def drop_weights(model: PreTrainedModel) -> None:
    """Frees them until :func:`own_weights`."""
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)
    _free(next(model.parameters()).device)


def own_weights(model: PreTrainedModel) -> None:
    """Gives every weight its own memory and random numbers of the size that initialisation would give it."""
    for parameter in model.parameters():
        own = torch.empty(parameter.meta_shape, dtype=parameter.dtype, device=parameter.device)
        parameter.data = own.fill_(1.0) if own.dim() == 1 else own.normal_(0, 0.02)
    _free(next(model.parameters()).device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
