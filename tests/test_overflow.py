"""A full cache: an error in time, on every device, and without a wait for the length in every step.

What a GPU would do is played by the CPU: it marks rows instead of raising, and numbers come late.
"""

import pytest
import torch

from innerq_compile import InnerQCache, ops
from innerq_compile.cache import overflow
from innerq_compile.cache.layer import InnerQLayer
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import SLOTS, allocate_state
from innerq_compile.passes.decode.appends import find_appends

CAPACITY = 200


class LateCopy:
    """A copy that arrives when it has been asked for ``lag`` times."""

    lag = 0

    def __init__(self, counts):
        self.start(counts)

    def start(self, counts):
        self.found, self.asked = int(counts[:, SLOTS].max()), 0

    def length(self):
        self.asked += 1
        return self.found if self.asked > self.lag else None


@pytest.fixture
def waits(monkeypatch):
    """Makes the CPU a device that work is queued for; the lengths that the host has waited for."""
    lengths = []

    def read_length(counts):
        lengths.append(int(counts[:, SLOTS].max()))
        return lengths[-1]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(overflow, "runs_behind", lambda counts: True)
    monkeypatch.setattr(overflow, "Copy", LateCopy)
    monkeypatch.setattr(overflow, "read_length", read_length)
    monkeypatch.setattr(ops, "check_overflow", lambda *args: None)
    return lengths


def tokens(count, heads=2, head_dim=32):
    return [torch.randn(1, heads, count, head_dim, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def append(cache, count, layers=(0, 1)):
    for index in layers:
        cache.update(*tokens(count), index)


def filled(config, length):
    cache = InnerQCache(config, max_cache_len=CAPACITY)
    append(cache, length)
    return cache


def lengths(cache):
    return [int(layer.get_seq_length()) for layer in cache.layers]


@pytest.mark.parametrize("lag", [0, 3, 10**9])
@pytest.mark.parametrize("masks", [0, 2])
def test_a_full_cache_is_refused_in_time_and_the_length_awaited_only_near_its_end(
    tiny_config, waits, monkeypatch, lag, masks
):
    """However late numbers arrive, and however often a step is announced beside its append."""
    monkeypatch.setattr(LateCopy, "lag", lag)
    cache = filled(tiny_config, 60)
    for _ in range(CAPACITY - 60):
        for _ in range(masks):
            cache.get_mask_sizes(1, 0)
        append(cache, 1)
    far_from_full = [length for length in waits[1:] if length < CAPACITY - 8]
    assert not far_from_full if lag < 10 or not masks else len(far_from_full) < 8
    message = "layer 0: InnerQ cache is full: it holds 200 tokens, 1 more do not fit its capacity of 200.*max_cache_len"
    for call in (lambda: append(cache, 1), lambda: cache.get_mask_sizes(1, 0)):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert lengths(cache) == [CAPACITY, CAPACITY]


def test_a_longer_chunk_that_does_not_fit_is_refused_before_it_changes_anything(tiny_config, waits):
    cache = filled(tiny_config, 120)
    with pytest.raises(RuntimeError, match="layer 0.*holds 120 tokens, 100 more do not fit its capacity of 200"):
        append(cache, 100)
    assert lengths(cache) == [120, 120]
    append(cache, 80)
    assert lengths(cache) == [200, 200]


def test_a_prompt_that_does_not_fit_names_the_layer(tiny_config, waits):
    cache = InnerQCache(tiny_config, max_cache_len=CAPACITY)
    append(cache, 1)
    cache.reset()
    with pytest.raises(RuntimeError, match="layer 0: InnerQ cache is too small: a prompt of 201 tokens"):
        append(cache, 201)


@pytest.mark.parametrize("call", ["mask", "update", "crop", "save", "grow"])
def test_lost_tokens_are_told_by_the_next_call_until_the_cache_is_emptied(tiny_config, waits, tmp_path, call):
    """Appended by a graph that no code of ours surrounds: a replayed CUDA graph, stock Inductor."""
    cache = filled(tiny_config, 150)
    for layer in cache.layers:
        ops.append_kv(*tokens(60), *layer.state, layer.capacity, layer.spec)
        if call == "grow":
            layer.max_cache_len = None
    if call == "grow":
        cache._max_cache_len = None
    calls = {
        "mask": lambda: cache.get_mask_sizes(1, 0),
        "update": lambda: append(cache, 1),
        "crop": lambda: cache.crop(-50),
        "save": lambda: cache.save(tmp_path / "cache"),
        "grow": lambda: cache.get_mask_sizes(1, 0),
    }
    for _ in range(2):
        with pytest.raises(RuntimeError, match="layer 0: InnerQ cache has lost tokens: it was given 210.* 200.*reset"):
            calls[call]()
    assert lengths(cache) == [210, 210]
    assert not list(tmp_path.iterdir())
    cache.reset()
    append(cache, 100)
    assert lengths(cache) == [100, 100]


@pytest.mark.parametrize("length", [150, 190, 200])
def test_a_long_chunk_that_is_not_refused_in_time_attends_to_nan(length, waits):
    """In a graph for prompts of every length nobody may know in time; it must not write behind the keys either."""
    layer = InnerQLayer(InnerQConfig(), CAPACITY)
    layer.update(*tokens(length))
    chunk = tokens(60)
    keys, values = layer.update(*chunk)
    assert keys.shape[2] == CAPACITY
    assert keys[:, :, min(length, CAPACITY - 1) :].isnan().all()
    assert layer.get_seq_length() == length + 60


def test_the_cpu_names_the_layer_too(tiny_config):
    cache = filled(tiny_config, CAPACITY)
    with pytest.raises(RuntimeError, match="layer 0: InnerQ cache is full: it holds 200"):
        append(cache, 1)


class TestCompiled:
    """A compiled graph checks when it is entered. The graphs run uncompiled."""

    @pytest.fixture(autouse=True)
    def uncompiled(self, monkeypatch):
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches: gm.forward)
        torch._dynamo.reset()

    @pytest.mark.parametrize("device", ["cpu", "behind"])
    def test_a_model_is_stopped_before_it_runs(self, tiny_model, request, device):
        if device == "behind":
            request.getfixturevalue("waits")
        cache = InnerQCache(tiny_model.config, max_cache_len=CAPACITY)
        ids = torch.zeros(1, 198, dtype=torch.long)
        step = torch.compile(tiny_model, backend="innerq")
        with torch.no_grad():
            tiny_model(ids, past_key_values=cache)
            for _ in range(2):
                step(ids[:, :1], past_key_values=cache)
            before = [buffer.clone() for layer in cache.layers for buffer in layer.state]
            message = "model.layers.0.self_attn: InnerQ cache is full: it holds 200 tokens, 1 more do not fit.* of 200"
            with pytest.raises(RuntimeError, match=message):
                step(ids[:, :1], past_key_values=cache)
        after = [buffer for layer in cache.layers for buffer in layer.state]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    def test_numbers_that_change_from_call_to_call_are_found_among_the_inputs(self, waits):
        config = InnerQConfig()
        state = allocate_state(
            config, batch_size=1, num_kv_heads=2, head_dim=32, capacity=400, dtype=torch.float32, device="cpu"
        )
        found = []

        def backend(gm, inputs):
            found.append(find_appends(gm.graph))
            return overflow.checked(gm.forward, found[-1])

        @torch.compile(backend=backend, dynamic=True)
        def step(key, value, capacity):
            ops.append_kv(key * 2, value, *state, capacity, config.spec)

        for count, capacity in ((40, 399), (50, 400), (60, 398)):
            step(*tokens(count), capacity)
        [[appended]] = found
        assert isinstance(appended.num_new, list) and isinstance(appended.capacity, list)
        with pytest.raises(RuntimeError, match="holds 150 tokens, 70 more do not fit its capacity of 200"):
            step(*tokens(70), 200)
        assert state.counts[0, SLOTS] == 150
