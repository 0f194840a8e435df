"""Caches on disk and on other devices."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from innerq_compile import InnerQCache
from innerq_compile.folded import set_mark
from innerq_compile.layout import PADS, QUANTIZED, SLOTS
from innerq_compile.storage import FORMAT


def prompt(length=200, batch=1):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(length))


def prefilled(model, length=200, batch=1, mask=None, **settings):
    cache = InnerQCache(model.config, **settings)
    with torch.no_grad():
        model(prompt(length, batch), attention_mask=mask, past_key_values=cache)
    return cache


def continuation(model, cache, batch=1):
    ids = prompt(9, batch)
    with torch.no_grad():
        return torch.stack([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9)])


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "base", "max_cache_len": 512},
        {"preset": "hybrid", "max_cache_len": 300, "value_mode": "hybrid", "group_size": 16},
        {"preset": "int8"},
        {"preset": "small", "sink": 0, "recent": 1, "flush": 64},
    ],
)
@pytest.mark.parametrize("length", [3, 200])
def test_a_loaded_cache_goes_on_as_the_saved_one(tiny_model, tmp_path, settings, length):
    cache = prefilled(tiny_model, length, **settings)
    cache.save(tmp_path / "prefix.safetensors")
    loaded = InnerQCache.load(tmp_path / "prefix.safetensors", tiny_model.config)
    assert (loaded.config, loaded.max_cache_len) == (cache.config, cache.max_cache_len)
    assert torch.equal(continuation(tiny_model, loaded), continuation(tiny_model, cache))
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.safetensors"]


def test_padding_survives(tiny_model, tmp_path):
    mask = (torch.arange(200) >= torch.tensor([[0], [40]])).long()
    cache = prefilled(tiny_model, batch=2, mask=mask, max_cache_len=512)
    cache.save(tmp_path / "file")
    loaded = InnerQCache.load(tmp_path / "file", tiny_model.config)
    assert loaded.layers[0].state.counts[:, PADS].tolist() == [0, 40]


def test_only_what_is_in_use_is_written_and_the_capacity_may_change(tiny_model, tmp_path):
    cache = prefilled(tiny_model, max_cache_len=16384)
    cache.save(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < cache.memory_bytes / 4
    loaded = InnerQCache.load(tmp_path / "file", tiny_model.config, max_cache_len=256)
    assert loaded.memory_bytes < cache.memory_bytes / 4
    torch.testing.assert_close(continuation(tiny_model, loaded), continuation(tiny_model, cache))
    with pytest.raises(ValueError, match="it holds 200 tokens, more than the capacity of 199"):
        InnerQCache.load(tmp_path / "file", tiny_model.config, max_cache_len=199)


def test_an_empty_cache_can_be_saved(tiny_model, tmp_path):
    InnerQCache(tiny_model.config, preset="int4").save(tmp_path / "file")
    loaded = InnerQCache.load(tmp_path / "file", tiny_model.config)
    assert loaded.config.key_bits == 4 and loaded.get_seq_length() == 0


def test_sixteen_bit_layers_are_saved_too(make_model, tmp_path):
    config = Gemma3TextConfig(
        vocab_size=256,
        num_hidden_layers=2,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=64,
        intermediate_size=64,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = make_model(config)
    cache = prefilled(model, max_cache_len=256)
    cache.save(tmp_path / "file")
    loaded = InnerQCache.load(tmp_path / "file", config)
    assert torch.equal(continuation(model, loaded), continuation(model, cache))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2, that of this configuration 3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2"),
        ({"head_dim": 64}, "head_dim is 32"),
    ],
)
def test_another_model_is_refused(tiny_model, tiny_config, tmp_path, change, message):
    prefilled(tiny_model).save(tmp_path / "file")
    for name, value in change.items():
        setattr(tiny_config, name, value)
    with pytest.raises(ValueError, match=f"was saved for another model: its {message}"):
        InnerQCache.load(tmp_path / "file", tiny_config)


def test_a_model_whose_key_norm_was_folded_since_is_refused(tiny_model, tiny_config, tmp_path):
    prefilled(tiny_model).save(tmp_path / "file")
    set_mark(tiny_config, {"fingerprint": {"weight": 1.0}})
    with pytest.raises(ValueError, match="its folded key norm is None"):
        InnerQCache.load(tmp_path / "file", tiny_config)


def rewrite(path, header=None, drop=(), **tensors):
    """Writes the file again with another header text or other tensors."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if header is not None:
        metadata[FORMAT] = json.dumps({**json.loads(metadata[FORMAT]), **header})
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file({**kept, **tensors}, path, metadata=metadata)


def counts(slots, quantized, pads):
    return torch.tensor([[slots, quantized, pads]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"version": 2}}, "version 2 of the format, this is version 1"),
        ({"header": {"settings": {"key_bits": 3, "bits": 3}}}, "unknown InnerQ settings"),
        ({"header": {"settings": {"key_bits": 8}}}, "k_codes must be torch.uint8"),
        ({"header": {"settings": "base"}}, "settings and model must be objects"),
        ({"header": {"layers": [{}]}}, "does not describe 2 layers"),
        ({"header": {"max_cache_len": -1}}, "max_cache_len must be a positive integer"),
        ({"drop": ("1.k_codes",)}, "at layer 1: expected the tensors"),
        ({"7.k_codes": torch.zeros(1)}, "belong to no layer: 7.k_codes"),
        ({"0.v_window": torch.zeros(1, 2, 160, 64)}, "v_window must be torch.float32"),
        ({"0.v_scales": torch.zeros(1, 2, 9, 32)}, "v_scales must be torch.float16"),
        ({"0.k_window": torch.zeros(3)}, "at layer 0"),
        ({"0.counts": counts(200, 32, 0).int()}, "counts must be int64"),
        ({"0.counts": counts(513, 352, 0)}, "holds 513 tokens, more than the capacity of 512"),
        ({"0.counts": counts(200, 1 << 40, 0)}, "can have the counts"),
        ({"0.counts": counts(200, 33, 0)}, "can have the counts"),
        ({"0.counts": counts(200, -32, 0)}, "can have the counts"),
        ({"0.counts": counts(200, 32, -1)}, "can have the counts"),
        ({"0.counts": counts(300, 32, 0)}, "can have the counts"),
        ({"0.counts": counts(-1, 0, 0)}, "same number of slots"),
    ],
)
def test_a_damaged_file_is_refused(tiny_model, tmp_path, change, message):
    cache = prefilled(tiny_model, max_cache_len=512)
    assert cache.layers[0].state.counts.tolist() == [[200, 64, 0]]
    cache.save(tmp_path / "file")
    rewrite(tmp_path / "file", **change)
    with pytest.raises(ValueError, match=message):
        InnerQCache.load(tmp_path / "file", tiny_model.config)


def test_foreign_and_truncated_files_are_refused(tiny_model, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(ValueError, match="no saved InnerQ cache, or is damaged"):
        InnerQCache.load(path, tiny_model.config)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="a safetensors file, but no saved InnerQ cache"):
        InnerQCache.load(path, tiny_model.config)
    save_file({"weight": torch.zeros(2)}, path, metadata={FORMAT: "{"})
    with pytest.raises(ValueError, match="damaged header"):
        InnerQCache.load(path, tiny_model.config)
    prefilled(tiny_model).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="or is damaged"):
        InnerQCache.load(path, tiny_model.config)
    with pytest.raises(FileNotFoundError):
        InnerQCache.load(tmp_path / "nothing", tiny_model.config)


def test_moving_moves_every_buffer_and_what_is_appended_must_follow(tiny_model):
    cache = prefilled(tiny_model, max_cache_len=512)
    assert cache.to("meta") is cache
    assert {buffer.device.type for layer in cache.layers for buffer in layer.state} == {"meta"}
    key = torch.zeros(1, 2, 1, 32)
    with pytest.raises(ValueError, match="on meta, got keys of torch.float32 on cpu"):
        cache.update(key, key, 0)
    InnerQCache(tiny_model.config).to("cpu")


def test_moving_to_where_it_is_changes_nothing(tiny_model):
    cache = prefilled(tiny_model, max_cache_len=512)
    before = [[buffer.clone() for buffer in layer.state] for layer in cache.layers]
    cache.to("cpu")
    for layer, buffers in zip(cache.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.state, buffers, strict=True))
    assert int(cache.layers[0].state.counts[0, SLOTS]) == 200
    assert int(cache.layers[0].state.counts[0, QUANTIZED]) == 64
