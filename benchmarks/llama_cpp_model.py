"""llama.cpp on the weights of a transformers model: a GGUF file of them, and decode steps at any depth.

Needs gguf and llama-cpp-python (rivals.txt). The cache of a deep step is filled through llama.cpp's own format of a
saved sequence, with random numbers: a prefill of that length costs hours on a CPU and does not change a step's time.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

BLOCKS = {"f16": (1, 1, 2), "q4_0": (2, 32, 18), "q8_0": (8, 32, 34)}
"""ggml_type, numbers of a block, bytes of a block (for the quantized ones a 16-bit scale comes first)."""


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """The weights of a Llama without biases or scaled RoPE, in their own dtype (bfloat16 or float32).

    Raises:
        ValueError: It is another kind of model.
    """
    import gguf

    config = model.config
    if config.model_type != "llama" or config.attention_bias or config.rope_parameters["rope_type"] != "default":
        raise ValueError("only a Llama without biases and with plain RoPE is written")
    writer = gguf.GGUFWriter(path, "llama")
    facts = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim, "value_length": config.head_dim, "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_parameters["rope_theta"], "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size, "tokenizer_model": "no_vocab",
    }  # fmt: skip
    for name, fact in facts.items():
        getattr(writer, f"add_{name}")(fact)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{kind}." in name:  # llama.cpp rotates neighbouring channels, transformers the two halves of a head
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        if weight.dtype == torch.bfloat16 and weight.ndim == 2:
            data, kind = weight.contiguous().view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
        else:
            data, kind = weight.float().numpy(), None
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A context of llama.cpp whose keys and values are stored as ``kind``."""

    def __init__(self, path: Path, capacity: int, kind: str, flash: bool, threads: int):
        import llama_cpp

        self.api, self.kind, self.flash = llama_cpp, kind, flash
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = capacity, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = BLOCKS[kind][0]
        settings.flash_attn_type = int(flash)
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context for {kind}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def fill(self, tokens: int) -> None:
        """Replaces the cache by this many tokens of random keys and values."""
        layers = self.api.llama_model_n_layer(self.model)
        heads = self.api.llama_model_n_head_kv(self.model)
        width = heads * self.api.llama_model_n_embd(self.model) // self.api.llama_model_n_head(self.model)
        type_number, per_block, block_bytes = BLOCKS[self.kind]
        blocks = tokens * width // per_block
        rows = np.zeros((blocks, block_bytes), np.uint8)
        random = np.random.default_rng(0)
        if per_block == 1:
            rows[:] = random.standard_normal((blocks, 1)).astype(np.float16).view(np.uint8)
        else:
            rows[:] = random.integers(0, 256, rows.shape, np.uint8)
            rows[:, :2] = np.full(1, 1 / 64, np.float16).view(np.uint8)
        data = rows.tobytes()
        cells = np.zeros((tokens, 3), np.int32)  # position, number of sequences, the sequence
        cells[:, 0], cells[:, 1] = np.arange(tokens), 1
        per_token = len(data) // tokens
        keys = struct.pack("<iQ", type_number, per_token) + data
        values = keys if self.flash else struct.pack("<iII", type_number, block_bytes, width) + data
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        head = self._state()[:8] + struct.pack("<II", 1, tokens) + cells.tobytes()
        head += struct.pack("<II", not self.flash, layers)
        state = head + keys * layers + values * layers
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if self.api.llama_state_seq_set_data(self.context, buffer, len(state), 0) != len(state):
            raise RuntimeError("llama.cpp did not accept the filled cache: its format has changed")

    def _state(self) -> bytes:
        """The saved sequence; it begins with 8 bytes that every saved sequence begins with."""
        size = self.api.llama_state_seq_get_size(self.context, 0)
        buffer = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.context, buffer, size, 0)
        return bytes(buffer)

    def step(self, tokens: list[int], position: int) -> int:
        """Decodes these tokens, the first at this position; the most likely next one."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not decode")
        logits = self.api.llama_get_logits_ith(self.context, len(tokens) - 1)
        self.api.llama_batch_free(batch)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def close(self) -> None:
        """Gives its memory back."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
