"""Caches on disk and on other devices."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from innerq_compile import InnerQCache
from innerq_compile.cache import storage
from innerq_compile.cache.mark import set_mark
from innerq_compile.cache.storage import FORMAT
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS, LayerState, allocate_state


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
    for length, capacity in ((200, 256), (7, 256), (200, None)):
        cache = prefilled(model, length, max_cache_len=capacity)
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


def rewrite(path, header=None, drop=(), sign=False, **tensors):
    """Writes the file again with another header text or other tensors, and a checksum that is right if ``sign``."""
    with safe_open(path, "pt") as file:
        described = {**json.loads(file.metadata()[FORMAT]), **(header or {})}
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in drop} | tensors
    if sign:
        del described["checksum"]
        described["checksum"] = storage._checksum(described, kept)
    save_file(kept, path, metadata={FORMAT: json.dumps(described)})


def counts(slots, quantized, pads):
    return torch.tensor([[slots, quantized, pads]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"version": 1}}, "version 1 of the format, this is version 2"),
        ({"header": {"settings": {"key_bits": 3, "bits": 3}}}, "unknown InnerQ settings"),
        ({"header": {"settings": {"key_bits": 8}}}, "k_codes must be U8"),
        ({"header": {"settings": "base"}}, "settings and model must be objects"),
        ({"header": {"layers": [{}]}}, "does not describe 2 layers"),
        ({"header": {"max_cache_len": -1}}, "max_cache_len must be a positive integer"),
        ({"drop": ("1.k_codes",)}, "at layer 1: expected the tensors"),
        ({"7.k_codes": torch.zeros(1)}, "belong to no layer: 7.k_codes"),
        ({"0.v_window": torch.zeros(1, 2, 160, 64)}, "v_window must be F32"),
        ({"0.v_scales": torch.zeros(1, 2, 9, 32)}, "v_scales must be F16"),
        ({"0.k_window": torch.zeros(3)}, "at layer 0"),
        ({"0.counts": counts(200, 32, 0).int()}, "counts must be I64"),
        ({"0.counts": counts(201, 64, 0)}, "holds 201 tokens, its header says 200"),
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


@pytest.fixture
def allocations(monkeypatch):
    """The device of every layer state that is allocated: only shapes on meta before a file is found right."""
    devices = []

    def allocate(*args, **kwargs):
        devices.append(str(kwargs["device"]))
        return allocate_state(*args, **kwargs)

    monkeypatch.setattr("innerq_compile.cache.layer.allocate_state", allocate)
    return devices


LAYER_1 = tuple(f"1.{name}" for name in LayerState._fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": LAYER_1}, "at layer 1: expected the tensors k_codes"),
        ({"drop": LAYER_1, "header": {"layers": [200, 0]}}, r"its layers differ: \[\(0, 0\), \(1, 200\)\]"),
        ({"header": {"layers": [200, 0]}}, "expected the tensors of an empty layer: none, got"),
        ({"header": {"layers": [200, "200"]}}, "must be an integer >= 0, got '200'"),
        ({"header": {"layers": [True, True]}}, "must be an integer >= 0, got True"),
        ({"header": {"layers": [-1, -1]}}, "must be an integer >= 0, got -1"),
        ({"header": {"layers": [10**30, 10**30]}}, "its header says 1000"),
        ({"header": {"layers": {"0": 200, "1": 200}}}, "does not describe 2 layers"),
        ({"header": {"layers": None}}, "does not describe 2 layers"),
        ({"header": {"max_cache_len": 10**13}}, "its checksum is wrong"),
        ({"header": {"max_cache_len": 10**13}, "sign": True}, "a capacity of 10000000000000 tokens, more than 4096"),
        ({"header": {"max_cache_len": "512"}}, "max_cache_len must be a positive integer or None, got '512'"),
        ({"header": {"max_cache_len": True}}, "max_cache_len must be a positive integer or None, got True"),
        ({"header": {"max_cache_len": 0}}, "max_cache_len must be a positive integer or None, got 0"),
        ({"header": {"max_cache_len": [512]}}, "max_cache_len must be a positive integer or None"),
        ({"header": {"max_cache_len": 199}, "sign": True}, "holds 200 tokens, more than the capacity of 199"),
        ({"header": {"max_cache_len": 511}}, "its checksum is wrong"),
        ({"header": {"settings": {"sink": 10**13}}}, "has windows of 10000000000"),
        ({"header": {"settings": {"sink": 10**3}}}, "can have the counts"),
        ({"header": {"settings": {"sink": True}}}, "sink must be an integer"),
        ({"header": {"settings": {"key_bits": 8.0}}}, "key_bits must be one of"),
        ({"header": {"settings": {"key_bits": [3]}}}, "key_bits must be one of"),
        ({"header": {"settings": {"key_norm": {"a": []}}}}, "key_norm must be one of"),
        ({"header": {"settings": {"group_size": 64}}}, "expected the tensors keys, values, got"),
        ({"header": {"settings": {"max_cache_len": 5, "preset": "base"}}}, "unknown InnerQ settings"),
        ({"header": {"settings": []}}, "settings and model must be objects"),
        ({"header": {"model": {}}}, "saved for another model"),
        ({"header": {"version": True}}, "version True of the format"),
        ({"header": {"version": None}}, "version None of the format"),
        ({"header": {"checksum": None}}, "its checksum is wrong"),
        ({"header": {"grows_per_call": 7}}, "its checksum is wrong"),
        ({"0.counts": torch.zeros(1, 3, 1, dtype=torch.int64)}, "counts must be I64"),
        ({"0.counts": torch.zeros(0, 3, dtype=torch.int64)}, "counts must be I64"),
        ({"0.k_window": torch.zeros(10**9, 2, 160, 0)}, "none of them 0"),
        ({"0.k_window": torch.zeros(1, 2, 160, 32, dtype=torch.int32)}, "keys must be floats"),
        ({"0.k_window": torch.zeros(1, 2, 160, 32).half()}, "v_window must be F16"),
        ({"0.key_norm": torch.full((1, 2, 32), 0.5)}, "its checksum is wrong"),
    ],
)
def test_a_file_is_right_or_refused_before_anything_is_allocated(tiny_model, tmp_path, allocations, change, message):
    prefilled(tiny_model, max_cache_len=512).save(tmp_path / "file")
    rewrite(tmp_path / "file", **change)
    allocations.clear()
    with pytest.raises(ValueError, match=message) as error:
        InnerQCache.load(tmp_path / "file", tiny_model.config)
    assert str(tmp_path / "file") in str(error.value)
    assert not allocations


def test_every_flipped_byte_and_every_truncation_is_found(tiny_config, make_model, tmp_path, allocations):
    tiny_config.num_hidden_layers = 1
    model, path = make_model(tiny_config), tmp_path / "file"
    prefilled(model, 170, max_cache_len=256).save(path)
    right, allocated = path.read_bytes(), len(allocations)
    header_end = 8 + int.from_bytes(right[:8], "little")
    places = {*range(0, header_end, 13), *range(header_end, len(right), len(right) // 60), len(right) - 1}
    for place in sorted(places):
        path.write_bytes(right[:place] + bytes([right[place] ^ 0x21]) + right[place + 1 :])
        with pytest.raises(ValueError, match=str(path)):
            InnerQCache.load(path, model.config)
    for length in (0, 1, 7, 8, 100, header_end, len(right) - 1):
        path.write_bytes(right[:length])
        with pytest.raises(ValueError, match=str(path)):
            InnerQCache.load(path, model.config)
    path.write_bytes(right + b"x")
    with pytest.raises(ValueError, match=str(path)):
        InnerQCache.load(path, model.config)
    assert len(allocations) == allocated
    path.write_bytes(right)
    assert InnerQCache.load(path, model.config).num_tokens() == 170


def test_nesting_without_end_is_a_damaged_header(tiny_model, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "file", metadata={FORMAT: "[" * 100_000})
    with pytest.raises(ValueError, match="damaged header"):
        InnerQCache.load(tmp_path / "file", tiny_model.config)


def test_a_cropped_cache_survives(tiny_model, tmp_path):
    cache = prefilled(tiny_model, 300, max_cache_len=300)
    cache.crop(-60)
    cache.save(tmp_path / "file")
    loaded = InnerQCache.load(tmp_path / "file", tiny_model.config)
    assert torch.equal(continuation(tiny_model, loaded), continuation(tiny_model, cache))
    with pytest.raises(ValueError, match=r"holds 240 tokens, more than the capacity of 240 \(packed like these"):
        InnerQCache.load(tmp_path / "file", tiny_model.config, max_cache_len=240)


def test_saves_of_two_processes_do_not_meet_and_a_failed_one_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    cache, path, names = prefilled(tiny_model), tmp_path / "file", []
    cache.save(path)
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        names.append(target.name)
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("innerq_compile.cache.storage.save_file", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            cache.save(path)
    assert len(set(names)) == 2 and all(name.startswith("file.") for name in names)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_cache_in_the_middle_of_a_step_is_not_saved(tiny_model, tmp_path):
    cache = prefilled(tiny_model)
    key = torch.zeros(1, 2, 1, 32)
    cache.update(key, key, 0)
    with pytest.raises(ValueError, match=r"different numbers of tokens and cannot be saved: \[201, 200\]"):
        cache.save(tmp_path / "file")


def test_whether_a_cache_may_grow_between_calls_is_kept(tiny_model, tmp_path):
    cache = prefilled(tiny_model, max_cache_len=512)
    for grows in (True, False):
        cache.grows_per_call = grows
        cache.save(tmp_path / "file")
        assert InnerQCache.load(tmp_path / "file", tiny_model.config).grows_per_call is grows
    assert InnerQCache.load(tmp_path / "file", tiny_model.config, max_cache_len=600).grows_per_call is False


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
