"""What only a GPU can show: the ops on the device, CUDA graphs over a growing cache, whole models, huge buffers.

``make gpu`` runs this file; it skips itself where there is no GPU. tests/test_triton_*.py run there too, on the device.
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from innerq_compile import InnerQCache, disable, enable, ops
from innerq_compile.compiler.backend import register_kernels
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS, LayerState, allocate_state

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).resolve().parent))
from test_triton_attention import error_budget  # noqa: E402 the path comes first

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CAPACITY = 512
SETTINGS = [
    {},
    {"key_bits": 4, "value_bits": 2, "value_mode": "hybrid", "rope_pairs": "half"},
    {"key_bits": 8, "value_bits": 8, "group_size": 64, "key_mode": "asymmetric"},
]


@pytest.fixture(autouse=True)
def registered():
    register_kernels()
    torch._dynamo.reset()
    counters.clear()


def empty(config, device, dtype=torch.bfloat16, heads=2, head_dim=128):
    return allocate_state(
        config, batch_size=1, num_kv_heads=heads, head_dim=head_dim, capacity=CAPACITY, dtype=dtype, device=device
    )


def tokens(count, seed=0, dtype=torch.bfloat16, heads=2, head_dim=128):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, count, head_dim, generator=generator).to(dtype) for _ in range(2)]


def check_same(expected, got):
    for name, x, y in zip(LayerState._fields, expected, got, strict=True):
        assert torch.equal(x, y.cpu()), f"{name} differs"


@pytest.mark.parametrize("settings", SETTINGS)
def test_eager_ops_follow_the_reference_without_a_host_sync(settings):
    config = InnerQConfig(**settings)
    expected, got = empty(config, "cpu"), empty(config, "cuda")
    for seed, count in enumerate((200, 1, 1, 31, 40)):
        key, value = tokens(count, seed)
        reference.append_kv(key, value, expected, config)
        key, value = key.cuda(), value.cuda()
        ops.append_kv(key, value, *got, CAPACITY, config.spec)  # the first call compiles, which may synchronize
        check_same(expected, got)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.append_kv(key[:, :, :1], value[:, :, :1], *got, CAPACITY, config.spec)
        dequantized = ops.dequantize_kv(*got, CAPACITY, config.spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference.append_kv(key[:, :, :1].cpu(), value[:, :, :1].cpu(), expected, config)
    check_same(expected, got)
    for x, y in zip(reference.dequantize_kv(expected, config, CAPACITY), dequantized, strict=True):
        assert torch.equal(x, y.cpu())


GQA, MHA, D64 = (32, 8, 128), (32, 32, 128), (32, 8, 64)  # query heads, key-value heads, head_dim
LONG = (2900, 1, 33, 1)
FEW = ((1, "none", False), (5, "bool", True))
ALL = tuple(itertools.product((1, 5), ("none", "bool", "additive"), (False, True)))
"""(query tokens, mask, exact) of the attention: each is a kernel to compile."""

SETUPS = [
    *((preset, {}, shape, {}) for preset in ("base", "small", "hybrid", "int4", "int8") for shape in (GQA, MHA, D64)),
    *((preset, {}, GQA, {"chunks": LONG, "capacity": 3072}) for preset in ("base", "hybrid")),
    *((preset, {}, (8, 2, 128), {"dtype": torch.float16, "pads": 0, "calls": ALL}) for preset in ("base", "hybrid")),
    *(
        ("base", {"key_bits": bits, "value_bits": bits, "key_mode": mode, "value_mode": mode}, GQA, {})
        for mode in ("asymmetric", "hybrid")
        for bits in (2, 3, 4, 8)
    ),
    *((preset, {}, GQA, {}) for preset in ("paper-base", "paper-small", "paper-hybrid")),
    *(
        ("base", settings, shape, {"dtype": torch.float32})
        for settings, shape in (
            ({}, (3, 1, 96)),
            ({"key_norm": "off"}, (4, 4, 32)),
            ({"key_center": "runtime"}, (4, 2, 32)),
            ({"group_size": 16}, (8, 8, 64)),
            ({"group_size": 64}, (8, 1, 64)),
            ({"sink": 0, "recent": 1}, (6, 2, 128)),
            ({"sink": 5, "recent": 40, "flush": 64}, (16, 2, 256)),
        )
    ),
]


@pytest.mark.parametrize(
    ("preset", "settings", "shape", "more"),
    SETUPS,
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else None,
)
def test_caches_of_real_size_follow_the_reference_on_the_cpu(preset, settings, shape, more):
    """Two rows, one of them padded, chunk by chunk; then the whole cache as a model sees it, then attention.

    The reference runs on the CPU on copies of the same tokens, so nothing of the device's own arithmetic is trusted.
    """
    check_real_size(InnerQConfig.from_preset(preset, **settings), *shape, "cuda", **more)


def check_real_size(
    config, q_heads, heads, head_dim, device, dtype=torch.bfloat16, pads=3, chunks=(300, 1, 1, 31, 64, 1), capacity=512,
    calls=FEW,
):  # fmt: skip
    sizes = {"batch_size": 2, "num_kv_heads": heads, "head_dim": head_dim, "capacity": capacity, "dtype": dtype}
    expected, got = (allocate_state(config, **sizes, device=where) for where in ("cpu", device))
    expected.counts[0, PADS] = got.counts[0, PADS] = pads
    generator = torch.Generator().manual_seed(0)
    for count in chunks:
        key, value = (torch.randn(2, heads, count, head_dim, generator=generator) for _ in range(2))
        key, value = (2 * key).to(dtype), (value + 0.3).to(dtype)
        reference.append_kv(key, value, expected, config)
        ops.append_kv(key.to(device), value.to(device), *got, capacity, config.spec)
        check_same(expected, got)
    for x, y in zip(
        reference.dequantize_kv(expected, config, capacity), ops.dequantize_kv(*got, capacity, config.spec), strict=True
    ):
        assert torch.equal(x, y.cpu())
    for q_len, kind, exact in calls:
        query = torch.randn(2, q_heads, q_len, head_dim, generator=generator).to(dtype)
        allowed = torch.rand(2, 1, q_len, capacity, generator=generator) < 0.8
        additive = torch.randn(1, q_heads, q_len, capacity, generator=generator).to(dtype)
        mask = {"none": None, "bool": allowed, "additive": additive}[kind]
        arguments = (head_dim**-0.5, config, capacity)
        wanted = reference.decode_attention(query, expected, mask, *arguments, torch.float64)
        mask = mask if mask is None else mask.to(device)
        query = query.to(device)
        out = ops.decode_attention(query, *got, mask, arguments[0], capacity, config.spec, exact)
        budget = error_budget(query, got, mask, *arguments, exact=exact)
        excess = (out.double() - wanted.to(device).double()).abs() - budget
        assert excess.max() <= 0, f"{q_len} {kind} exact={exact}: over the budget by {excess.max():.2e}"


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_graph_replayed_serves_every_length(settings):
    """Captured once on an empty cache, replayed across several flushes."""
    config = InnerQConfig(**settings)
    expected, got = empty(config, "cpu"), empty(config, "cuda")
    key, value = (x.cuda() for x in tokens(1))
    query = torch.randn(1, 8, 1, 128, dtype=torch.bfloat16, device="cuda")

    def step():
        ops.append_kv(key, value, *got, CAPACITY, config.spec)
        return ops.decode_attention(query, *got, None, 128**-0.5, CAPACITY, config.spec)

    step()  # compiles
    for buffer, fresh in zip(got, empty(config, "cuda"), strict=True):
        buffer.copy_(fresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for index in range(config.sink + config.recent + 2 * config.flush_tokens + 3):
        new_key, new_value = tokens(1, index)
        reference.append_kv(new_key, new_value, expected, config)
        key.copy_(new_key)
        value.copy_(new_value)
        graph.replay()
    check_same(expected, got)
    assert got.counts[0, QUANTIZED] == 2 * config.flush_tokens
    again = ops.decode_attention(query, *got, None, 128**-0.5, CAPACITY, config.spec)
    assert torch.equal(out, again)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("count", [1, 4])
def test_compiled_ops_change_the_same_buffers(mode, count):
    """Through Inductor, which gets the kernels in place of the ops; compiled once, for every length."""
    config = InnerQConfig(value_bits=2, value_mode="hybrid")
    expected, got = empty(config, "cpu"), empty(config, "cuda")
    for buffer in got:
        torch._dynamo.mark_static_address(buffer)

    def step(key, value, *state):
        ops.append_kv(2 * key, value, *state, CAPACITY, config.spec)
        keys, values = ops.dequantize_kv(*state, CAPACITY, config.spec)
        return keys + 0, values + 0

    compiled = torch.compile(step, backend="innerq", mode=mode, fullgraph=True)
    for seed in range(200 // count):
        key, value = tokens(count, seed)
        reference.append_kv(2 * key, value, expected, config)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            found = compiled(key.cuda(), value.cuda(), *got)
    check_same(expected, got)
    # Inductor may fuse the product with the key norm and the sum with the center: one rounding of float32 less.
    for x, y in zip(reference.dequantize_kv(expected, config, CAPACITY), found, strict=True):
        torch.testing.assert_close(y.cpu(), x, rtol=torch.finfo(x.dtype).eps, atol=0.0)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def logits_of(model, cache, steps, compile_arguments=None):
    """Logits of a decode that is fed fixed tokens, so that a near tie cannot make two runs diverge."""
    ids = torch.randint(0, 256, (1, 150 + steps), generator=torch.Generator().manual_seed(1)).cuda()
    forward = model if compile_arguments is None else torch.compile(model, **compile_arguments)
    with torch.no_grad():
        logits = [model(ids[:, :150], past_key_values=cache).logits[:, -1]]
        for index in range(150, 150 + steps):
            torch.compiler.cudagraph_mark_step_begin()
            logits.append(forward(ids[:, index : index + 1], past_key_values=cache).logits[:, -1].clone())
    return torch.stack(logits)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_model_equals_the_eager_one_with_the_same_cache(tiny_model, tiny_config, mode):
    """60 steps over two flushes, compiled once. A key that rounds differently may move to the next code, so the two
    differ by less than quantization itself does, which is measured against the cache of the model's own dtype.
    """
    model = tiny_model.cuda()
    eager = logits_of(model, InnerQCache(tiny_config, max_cache_len=CAPACITY), 60)
    unquantized = logits_of(model, DynamicCache(config=tiny_config), 60)
    options = {"exact": True, "triton.cudagraphs": mode is not None}
    compiled = {"backend": "innerq", "fullgraph": True, "options": options}
    fast = logits_of(model, InnerQCache(tiny_config, max_cache_len=CAPACITY), 60, compiled)
    assert (fast - eager).abs().max() < (eager - unquantized).abs().max()
    assert (fast - eager).abs().mean() < (eager - unquantized).abs().mean() / 10
    assert counters["stats"]["unique_graphs"] == 1


def test_generate_on_the_device(tiny_model, tiny_config):
    """The same tokens from generate() compiled and not; and the cache is used, not transformers' own."""
    model = tiny_model.cuda()
    ids = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(0)).cuda()
    settings = {"max_new_tokens": 50, "do_sample": False}
    caches = [InnerQCache(tiny_config, max_cache_len=CAPACITY) for _ in range(2)]
    # On a GPU generate() compiles the decode step by itself, with Inductor.
    eager = model.generate(ids, past_key_values=caches[0], disable_compile=True, **settings)
    model.compile(backend="innerq", options={"exact": True})
    fast = model.generate(ids, past_key_values=caches[1], **settings)
    assert torch.equal(eager, fast)
    assert caches[1].layers[0].state.counts[0].tolist()[:2] == [199, 64]
    exact = model.generate(ids, past_key_values=DynamicCache(config=tiny_config), **settings)
    assert exact.shape == fast.shape


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_an_enabled_model_generates_what_the_uncompiled_one_does(tiny_model, tiny_config, mode):
    """Two prompts, of which the second is longer, each decoded over a flush; with and without CUDA graphs."""
    model = tiny_model.cuda()
    generator = torch.Generator().manual_seed(0)
    settings = {"max_new_tokens": 40, "do_sample": False}
    for length in (150, 170):
        ids = torch.randint(0, 256, (1, length), generator=generator).cuda()
        eager = InnerQCache(tiny_config, max_cache_len=CAPACITY)
        expected = model.generate(ids, past_key_values=eager, disable_compile=True, **settings)
        enable(model, exact=True, mode=mode)
        assert torch.equal(model.generate(ids, **settings), expected)
        disable(model)


def test_tokens_that_a_replayed_graph_could_not_store_turn_its_results_to_nan():
    """No code of ours runs between the replays; the mark is in the counts."""
    config = InnerQConfig()
    got = empty(config, "cuda")
    key, value = (x.cuda() for x in tokens(1))
    query = torch.randn(1, 8, 1, 128, dtype=torch.bfloat16, device="cuda")

    def step():
        ops.append_kv(key, value, *got, CAPACITY, config.spec)
        return ops.decode_attention(query, *got, None, 128**-0.5, CAPACITY, config.spec)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    ops.append_kv(*(x.cuda() for x in tokens(CAPACITY - 3)), *got, CAPACITY, config.spec)
    for slots, is_right in ((CAPACITY - 1, True), (CAPACITY, True), (CAPACITY + 1, False), (CAPACITY + 2, False)):
        graph.replay()
        assert got.counts[0, SLOTS] == slots
        assert out.isfinite().all() if is_right else out.isnan().all()
    assert all(x.isnan().all() for x in ops.dequantize_kv(*got, CAPACITY, config.spec))


@pytest.mark.parametrize(
    "compile_arguments", [None, {"backend": "innerq"}, {"backend": "innerq", "mode": "reduce-overhead"}]
)
def test_a_full_cache_is_refused_before_the_call_and_awaited_in_no_other(tiny_model, tiny_config, compile_arguments):
    model = tiny_model.cuda()
    cache = InnerQCache(tiny_config, max_cache_len=CAPACITY)
    ids = torch.zeros(1, CAPACITY - 20, dtype=torch.long, device="cuda")
    forward = model if compile_arguments is None else torch.compile(model, **compile_arguments)
    mask = torch.ones(1, 1, 1, CAPACITY, dtype=torch.bool, device="cuda")
    position = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    settings = {"past_key_values": cache, "attention_mask": mask, "position_ids": position}
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for index in range(20):
            torch.compiler.cudagraph_mark_step_begin()
            forward(ids[:, :1], **settings)
            # The first calls compile; the last are near enough to the end for the host to want to know.
            torch.cuda.set_sync_debug_mode("error" if 3 <= index < 12 else "default")
        torch.cuda.set_sync_debug_mode("default")
        with pytest.raises(
            RuntimeError, match=f"holds {CAPACITY} tokens, 1 more do not fit its capacity of {CAPACITY}"
        ):
            forward(ids[:, :1], **settings)
    assert all(layer.get_seq_length() == CAPACITY for layer in cache.layers)


def test_lost_tokens_are_told_by_the_copy_of_the_counts(tiny_model, tiny_config):
    cache = InnerQCache(tiny_config, max_cache_len=CAPACITY)
    model = tiny_model.cuda()
    ids = torch.zeros(1, 100, dtype=torch.long, device="cuda")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.layers[0].state.counts[:, SLOTS] = CAPACITY + 5
        cache.get_mask_sizes(1, 0)  # may not know it yet, but sends for it
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=f"layer 0: InnerQ cache has lost tokens: it was given {CAPACITY + 5}"):
            cache.get_mask_sizes(1, 0)


def test_more_than_two_billion_elements():
    """Buffers beyond 2**31 elements on the device: the last head is written and read where it should be."""
    config = InnerQConfig(key_bits=8, value_bits=8)
    free = torch.cuda.mem_get_info()[0]
    heads, capacity = 16, 1_200_000
    if free < 8 * heads * capacity * 128:
        pytest.skip("needs 20 GB of free memory")
    state = allocate_state(
        config, batch_size=1, num_kv_heads=heads, head_dim=128, capacity=capacity, dtype=torch.bfloat16, device="cuda"
    )
    assert state.k_codes.numel() > 2**31
    small = empty(config, "cpu", heads=heads)
    key, value = tokens(300, heads=heads)
    reference.append_kv(key, value, small, config)
    ops.append_kv(key.cuda(), value.cuda(), *state, capacity, config.spec)
    assert state.counts[0, SLOTS] == 300
    for name in ("k_codes", "k_scales", "v_codes", "v_scales"):
        expected, got = getattr(small, name), getattr(state, name)
        assert torch.equal(expected, got[:, :, : expected.shape[2]].cpu()), name
        assert not got[:, :, expected.shape[2] :].any()
