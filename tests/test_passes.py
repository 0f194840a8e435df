"""The passes on toy layers that hold exactly the pattern, and on near misses that must be left alone."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from innerq_compile import ops
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import LayerState, allocate_state
from innerq_compile.passes.decode import run_passes
from innerq_compile.passes.decode.match import DecodeSite, match
from innerq_compile.passes.decode.verify import PassError, verify
from innerq_compile.passes.report import Report, SiteReport

CAPACITY, HEAD_DIM, HELD = 256, 32, 200
CONFIG = InnerQConfig.from_preset("base")


def filled_state(num_kv_heads: int = 2, batch: int = 1) -> LayerState:
    state = allocate_state(
        CONFIG,
        batch_size=batch,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        capacity=CAPACITY,
        dtype=torch.float32,
        device="cpu",
    )
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, batch, num_kv_heads, HELD, HEAD_DIM, generator=generator)
    ops.append_kv(keys, values, *state, CAPACITY, CONFIG.spec)
    return state


def visible(q_len: int = 1, batch: int = 1) -> torch.Tensor:
    """[B, 1, q_len, capacity] boolean causal mask of a chunk appended to a filled state."""
    slot = torch.arange(CAPACITY)
    last = HELD + torch.arange(q_len)
    return (slot <= last[:, None])[None, None].expand(batch, 1, q_len, CAPACITY).contiguous()


def repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
    B, H, N, D = x.shape
    return x[:, :, None, :, :].expand(B, H, n, N, D).reshape(B, H * n, N, D)


def append(key, value, state):
    ops.append_kv(key, value, *state, CAPACITY, CONFIG.spec)


def dequantize(state):
    return ops.dequantize_kv(*state, CAPACITY, CONFIG.spec)


def attend(query, keys, values, mask, **kwargs):
    """SDPA behind transformers' repetition of heads."""
    n = query.shape[1] // keys.shape[1]
    if n > 1 and not kwargs.get("enable_gqa"):
        keys, values = repeat_kv(keys, n), repeat_kv(values, n)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, **kwargs)


def decode_step(query, key, value, mask, state):
    """What a layer and InnerQCache do for a decode step."""
    append(key, value, state)
    return attend(query, *dequantize(state), mask, scale=0.2)


def inputs(num_q_heads: int = 4, num_kv_heads: int = 2, q_len: int = 1, batch: int = 1):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(batch, num_q_heads, q_len, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, batch, num_kv_heads, q_len, HEAD_DIM, generator=generator)
    return query, key, value, visible(q_len, batch), filled_state(num_kv_heads, batch)


class Captured:
    """One function through Dynamo and the passes: its report, op counts before and after, and its outputs."""

    def __init__(self, step: Callable, arguments: tuple, *, grad: bool = False, dynamic: bool | None = None) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

        def backend(gm, example_inputs):
            self.before = count(gm)
            self.report = run_passes(gm, exact=True)  # other tests may have attached kernels that round
            self.after = count(gm)
            self.graphs.append(gm)
            return gm.forward

        torch._dynamo.reset()
        self.plain_arguments, self.arguments = clone(arguments), clone(arguments)
        with torch.set_grad_enabled(grad):
            self.expected = step(*self.plain_arguments)
            self.got = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)(*self.arguments)

    @property
    def reason(self) -> str:
        [site] = self.report.sites
        return site.reason


def captured_graph(step: Callable) -> torch.fx.GraphModule:
    """The graph that Dynamo hands to a backend, before any pass."""
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(step, backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)(*inputs())
    return graphs[0]


def clone(x):
    if isinstance(x, torch.Tensor):
        return x.clone()
    return type(x)(*map(clone, x)) if isinstance(x, LayerState) else tuple(map(clone, x))


def count(gm: torch.fx.GraphModule) -> dict[str, int]:
    targets = [getattr(node.target, "default", node.target) for node in gm.graph.nodes]
    return {
        "dequantize": targets.count(ops.dequantize_kv),
        "sdpa": targets.count(F.scaled_dot_product_attention),
        "fused": targets.count(ops.decode_attention),
    }


def assert_same(captured: Captured) -> None:
    """Both graphs compute float32 attention over the same dequantized cache: sums of 201 products in another order."""
    rounding = 8 * HEAD_DIM * torch.finfo(torch.float32).eps * captured.expected.abs().max()
    assert (captured.got - captured.expected).abs().max() <= rounding
    for mine, plain in zip(captured.arguments[-1], captured.plain_arguments[-1], strict=True):
        assert torch.equal(mine, plain)


def positional(query, key, value, mask, state):
    append(key, value, state)
    keys, values = (repeat_kv(x, 2) for x in dequantize(state))
    return F.scaled_dot_product_attention(query, keys, values, mask, 0.0, False)


def grouped(query, key, value, mask, state):
    append(key, value, state)
    return attend(query, *dequantize(state), mask, enable_gqa=True)


def function_style(query, key, value, mask, state):
    append(key, value, state)

    def repeat(x):
        x = torch.clone(x.contiguous()).to(query.dtype)
        return torch.reshape(torch.unsqueeze(x, -3).expand(-1, -1, 2, -1, -1), (1, 4, CAPACITY, HEAD_DIM))

    keys, values = dequantize(state)
    return torch._C._nn.scaled_dot_product_attention(query, repeat(keys), repeat(values), attn_mask=mask)


def interleaved(query, key, value, mask, state):
    append(key, value, state)
    keys, values = (x.repeat_interleave(2, dim=1) for x in dequantize(state))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def additive_mask(query, key, value, mask, state):
    append(key, value, state)
    bias = torch.where(mask, 0.5, torch.finfo(torch.float32).min)
    return attend(query, *dequantize(state), bias)


def op_packets(query, key, value, mask, state):
    torch.ops.innerq.append_kv(key, value, *state, CAPACITY, CONFIG.spec)
    return attend(query, *torch.ops.innerq.dequantize_kv(*state, CAPACITY, CONFIG.spec), mask)


def reads_what_another_layer_wrote(query, key, value, mask, state):
    return attend(query, *dequantize(state), mask & (torch.arange(CAPACITY) < HELD))


@pytest.mark.parametrize(
    "step",
    [
        decode_step,
        positional,
        grouped,
        function_style,
        interleaved,
        additive_mask,
        op_packets,
        reads_what_another_layer_wrote,
    ],
    ids=lambda step: step.__name__,
)
def test_pattern_is_fused_and_computes_the_same(step):
    captured = Captured(step, inputs())
    assert captured.before == {"dequantize": 1, "sdpa": 1, "fused": 0}
    assert captured.after == {"dequantize": 0, "sdpa": 0, "fused": 1}
    assert (captured.report.found, captured.report.rewritten, captured.report.refused) == (1, 1, 0)
    assert_same(captured)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_q_heads": 2},
        {"num_q_heads": 8, "num_kv_heads": 1},
        {"q_len": 5},
        {"q_len": CONFIG.max_fused_q_len},
        {"batch": 3},
    ],
    ids=str,
)
def test_shapes_that_are_fused(shape):
    captured = Captured(decode_step, inputs(**shape))
    assert captured.report.rewritten == 1
    assert_same(captured)


def by_length(query, key, value, mask, state):
    """The branch of InnerQCache: its guard bounds a symbolic query length."""
    return (decode_step if key.shape[2] <= CONFIG.max_fused_q_len else long_chunk)(query, key, value, mask, state)


def test_symbolic_batch_and_query_length_are_fused():
    captured = Captured(by_length, inputs(batch=3, q_len=5), dynamic=True)
    assert captured.report.rewritten == 1
    [gm] = captured.graphs
    [fused] = [node for node in gm.graph.nodes if node.target is ops.decode_attention]
    assert isinstance(fused.meta["example_value"].shape[0], torch.SymInt)
    assert_same(captured)


def test_default_scale_is_the_one_of_sdpa():
    captured = Captured(grouped, inputs())
    [fused] = [node for node in captured.graphs[0].graph.nodes if node.target is ops.decode_attention]
    assert fused.args[1 + len(LayerState._fields) + 1] == 1 / math.sqrt(HEAD_DIM)


def test_metadata_of_the_attention_moves_to_the_fused_node():
    gm = captured_graph(decode_step)
    [before] = [dict(node.meta) for node in gm.graph.nodes if node.target is F.scaled_dot_product_attention]
    run_passes(gm)
    [after] = [node.meta for node in gm.graph.nodes if node.target is ops.decode_attention]
    assert before == after and {"example_value", "stack_trace"} <= set(after)


def dropout(query, key, value, mask, state):
    append(key, value, state)
    return attend(query, *dequantize(state), mask, dropout_p=0.5)


def causal(query, key, value, mask, state):
    append(key, value, state)
    return attend(query, *dequantize(state), None, is_causal=True)


def no_mask(query, key, value, mask, state):
    append(key, value, state)
    return attend(query, *dequantize(state), None)


def second_user_of_keys(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    return attend(query, keys, values, mask) + keys.mean()


def second_user_of_an_intermediate(query, key, value, mask, state):
    append(key, value, state)
    keys, values = (repeat_kv(x, 2) for x in dequantize(state))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask) + values.mean()


def keys_are_returned(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    return attend(query, keys, values, mask), keys


def attends_twice(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    return attend(query, keys, values, mask, enable_gqa=True) + attend(query, keys, values, mask, enable_gqa=True)


def only_keys(query, key, value, mask, state):
    append(key, value, state)
    keys, _ = dequantize(state)
    return attend(query, keys, value.expand(-1, -1, CAPACITY, -1), mask)


def foreign_op(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    return attend(query, keys * 1.0, values, mask)


def foreign_slice(query, key, value, mask, state):
    append(key, value, state)
    keys, values = (x[:, :, :240] for x in dequantize(state))
    return attend(query, keys, values, mask[..., :240])


def heads_in_another_order(query, key, value, mask, state):
    append(key, value, state)
    keys, values = (x[:, None].expand(-1, 2, -1, -1, -1).reshape(1, 4, CAPACITY, HEAD_DIM) for x in dequantize(state))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def swapped(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    return attend(query, values, keys, mask)


def queries_itself(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    return F.scaled_dot_product_attention(keys, keys, values, attn_mask=mask)


def two_caches(query, key, value, mask, state):
    keys, values = dequantize(state)
    other = LayerState(*(buffer.clone() for buffer in state))
    other_keys, other_values = dequantize(other)
    return attend(query, keys, other_values, mask) + attend(query, other_keys, values, mask)


def appended_in_between(query, key, value, mask, state):
    keys, values = dequantize(state)
    append(key, value, state)
    return attend(query, keys, values, mask)


def cropped_in_between(query, key, value, mask, state):
    keys, values = dequantize(state)
    state.counts[:, 0].sub_(3)
    return attend(query, keys, values, mask)


def scale_from_the_graph(query, key, value, mask, state):
    append(key, value, state)
    return attend(query, *dequantize(state), mask, scale=query.shape[0] * 0.1)


def flex(query, key, value, mask, state):
    append(key, value, state)
    return flex_attention(query, *dequantize(state), enable_gqa=True)


NEAR_MISSES = [
    (dropout, "dropout_p = 0.5"),
    (causal, "is_causal"),
    (no_mask, "no mask"),
    (second_user_of_keys, "keys have a second user"),
    (second_user_of_an_intermediate, "values have a second user"),
    (keys_are_returned, "keys have a second user: .*output"),
    (attends_twice, "keys have a second user"),
    (only_keys, "not each taken exactly once"),
    (foreign_op, "mul stands between dequantize_kv and the attention .keys."),
    (foreign_slice, "getitem stands between"),
    (heads_in_another_order, "getitem stands between"),
    (swapped, "do not stand as keys and values"),
    (queries_itself, "also the query"),
    (appended_in_between, "append_kv changes the cache between its read and the attention"),
    (cropped_in_between, "sub_ changes the cache"),
    (flex, 'flex_attention takes functions .* use attn_implementation="sdpa"'),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("step", "reason"), NEAR_MISSES, ids=lambda x: getattr(x, "__name__", ""))
def test_near_miss_is_left_alone_and_reported(step, reason):
    torch.manual_seed(0)
    captured = Captured(step, inputs())
    assert captured.after == captured.before
    assert (captured.report.found, captured.report.rewritten, captured.report.refused) == (1, 0, 1)
    pytest.raises(ValueError, _raise, captured.reason).match(reason)


def _raise(text):
    raise ValueError(text)


def spelled_out(query, key, value, mask, state, *, steps=lambda scores, mask: scores * 0.2 + mask, last=lambda x: x):
    """Eager attention of transformers; ``steps`` leads from the scores to the softmax, ``last`` from it to the values.

    The mask becomes additive, once, as the model does it for all its layers.
    """
    append(key, value, state)
    keys, values = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in dequantize(state))
    bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    scores = steps(query @ keys.transpose(2, 3), bias)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return last(weights) @ values


def eager_llama(*arguments):
    return spelled_out(*arguments, last=lambda x: F.dropout(x, p=0.0, training=False))


def eager_falcon(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    scores = query @ keys.repeat_interleave(2, 1).transpose(-1, -2)
    scores /= math.sqrt(HEAD_DIM)
    return F.softmax(scores + bias, dim=-1, dtype=query.dtype) @ values.repeat_interleave(2, 1)


def eager_with_methods(query, key, value, mask, state):
    append(key, value, state)
    keys, values = (repeat_kv(x, 2) for x in dequantize(state))
    scores = torch.mul(query.matmul(keys.transpose(-2, -1)), 0.5).div(2).float().contiguous()
    weights = torch.softmax(torch.add(torch.where(mask, 0.0, -1e9), scores), 3)
    return torch.matmul(F.dropout(weights.type(query.dtype), 0.7, False).type_as(query), values)


def eager_unscaled_shared_head(query, key, value, mask, state):
    """One key-value head that broadcasts over the query heads; the query was scaled before."""
    append(key, value, state)
    keys, values = dequantize(state)
    return torch.softmax(query @ keys.transpose(2, 3) + torch.where(mask, 0.0, -1e9), -1) @ values


def spelled_count(gm: torch.fx.GraphModule) -> int:
    return sum(getattr(node.target, "__name__", node.target) in {"matmul", "softmax"} for node in gm.graph.nodes)


@pytest.mark.parametrize(
    ("step", "heads"),
    [(spelled_out, 2), (eager_llama, 2), (eager_falcon, 2), (eager_with_methods, 2), (eager_unscaled_shared_head, 1)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_spelled_out_attention_is_fused_and_computes_the_same(step, heads):
    captured = Captured(step, inputs(num_kv_heads=heads))
    assert captured.before == {"dequantize": 1, "sdpa": 0, "fused": 0}
    assert captured.after == {"dequantize": 0, "sdpa": 0, "fused": 1} and not spelled_count(captured.graphs[0])
    assert (captured.report.found, captured.report.rewritten, captured.report.refused) == (1, 1, 0)
    assert_same(captured)


@pytest.mark.parametrize(
    ("steps", "scale"),
    [
        (lambda scores, mask: scores + mask, 1.0),
        (lambda scores, mask: 0.25 * scores / 2 + mask, 0.125),
        (lambda scores, mask: mask + scores, 1.0),
    ],
)
def test_scale_of_spelled_out_attention_is_gathered(steps, scale):
    captured = Captured(lambda *arguments: spelled_out(*arguments, steps=steps), inputs())
    [fused] = [node for node in captured.graphs[0].graph.nodes if node.target is ops.decode_attention]
    assert fused.args[1 + len(LayerState._fields) + 1] == scale
    assert_same(captured)


def test_spelled_out_attention_in_16_bit_is_fused():
    query, key, value, mask, state = inputs()
    state = state._replace(k_window=state.k_window.bfloat16(), v_window=state.v_window.bfloat16())
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    captured = Captured(eager_llama, (query, key, value, mask, state))
    assert captured.report.rewritten == 1 and captured.got.dtype == torch.bfloat16
    # The spelled out steps round scores and weights to bfloat16, the fused op only its result.
    exact = reference.decode_attention(
        query.double(), captured.plain_arguments[-1], mask, 0.2, CONFIG, CAPACITY, torch.float64
    )
    fused, spelled = ((x.double() - exact).abs().max() for x in (captured.got, captured.expected))
    assert fused <= spelled


def second_user_of_weights(*arguments):
    """What a model does whose output_attentions is set."""
    kept = []
    out = spelled_out(*arguments, last=lambda weights: kept.append(weights) or weights)
    return out, kept[0]


def shared_scores(*arguments):
    kept = []
    out = spelled_out(*arguments, steps=lambda scores, mask: kept.append(scores) or scores + mask)
    return out + kept[0].mean()


def sinks(scores, mask):
    scores = torch.cat([scores + mask, torch.zeros(1, 4, 1, 1)], dim=-1)
    return scores - scores.max(dim=-1, keepdim=True).values


def not_keys(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    return (keys.transpose(2, 3) @ key.new_ones(1, 2, CAPACITY, CAPACITY)).softmax(-1) @ values


def softmax_over_queries(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    return torch.softmax(query[:, :2] @ keys.transpose(2, 3), 2) @ values


def weights_of_another_layer(query, key, value, mask, state):
    append(key, value, state)
    keys, values = dequantize(state)
    weights = torch.softmax(query[:, :2] @ keys.transpose(2, 3) + torch.where(mask, 0.0, -1e9), -1)
    return weights @ value.expand(1, 2, CAPACITY, HEAD_DIM) + mask.float() @ values


def query_changes_on_the_way(query, key, value, mask, state):
    query = query * 1.0
    return spelled_out(query, key, value, mask, state, last=lambda weights: (query.zero_(), weights)[1])


SPELLED_NEAR_MISSES = [
    (second_user_of_weights, "attention weights have a second user: .*output_attentions"),
    (shared_scores, "attention scores have a second user"),
    (lambda scores, mask: torch.tanh(scores / 50.0) * 50.0 + mask, "logit soft-capping"),
    (sinks, "learned sink logits: cat"),
    (lambda scores, mask: scores.masked_fill(mask < 0, -1e9), "masked_fill stands between the attention scores"),
    (lambda scores, mask: scores + (mask == 0), "a mask of torch.bool is added"),
    (lambda scores, mask: (scores + mask) * 0.5, "mul stands between the attention scores"),
    (lambda scores, mask: scores + mask + mask, "add stands between the attention scores"),
    (lambda scores, mask: 1.0 / scores + mask, "a number is divided by the attention scores"),
    (lambda scores, mask: scores * 0.2, "no mask: empty slots"),
    (lambda scores, mask: scores * mask.amax() + mask, "mul stands between the attention scores"),
    (lambda scores, mask: torch.add(scores, mask, alpha=2), "add stands between the attention scores"),
    (lambda scores, mask: torch.div(scores, 2, rounding_mode="floor") + mask, "div stands between"),
    (not_keys, "no product of queries and keys"),
    (softmax_over_queries, "the softmax does not run over the keys"),
    (weights_of_another_layer, "keys and values go to different attentions"),
    (query_changes_on_the_way, "zero_ may change the query or the mask"),
]


@pytest.mark.parametrize(
    ("step", "reason"), SPELLED_NEAR_MISSES, ids=[reason[:40] for _, reason in SPELLED_NEAR_MISSES]
)
def test_spelled_out_near_miss_is_left_alone_and_reported(step, reason):
    if step is sinks or step.__name__ == "<lambda>":
        steps = step

        def step(*arguments):
            last = (lambda weights: weights[..., :-1]) if steps is sinks else (lambda weights: weights)
            return spelled_out(*arguments, steps=steps, last=last)

    captured = Captured(step, inputs())
    assert captured.after == captured.before
    assert (captured.report.found, captured.report.rewritten, captured.report.refused) == (1, 0, 1)
    pytest.raises(ValueError, _raise, captured.reason).match(reason)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (lambda weights: F.dropout(weights, 0.5, True), "dropout_p = 0.5"),
        (lambda weights: weights * 1.0, "mul stands between the attention weights and the values"),
        (lambda weights: weights.to(torch.int32).float(), "to stands between the attention weights"),
    ],
)
def test_changed_attention_weights_are_left_alone(last, reason):
    torch.manual_seed(0)
    captured = Captured(lambda *arguments: spelled_out(*arguments, last=last), inputs())
    assert captured.after == captured.before
    pytest.raises(ValueError, _raise, captured.reason).match(reason)


def test_keys_and_values_of_two_caches_are_left_alone():
    captured = Captured(two_caches, inputs())
    assert captured.after == captured.before
    assert [site.reason for site in captured.report.sites] == ["keys and values go to different attentions"] * 2


def test_scale_that_is_symbolic_is_left_alone():
    captured = Captured(scale_from_the_graph, inputs(batch=3), dynamic=True)
    assert captured.reason == "the softmax scale is computed in the graph" and captured.after == captured.before


def test_query_that_needs_a_gradient_is_left_alone():
    weight = torch.ones(1, requires_grad=True)
    captured = Captured(lambda query, *rest: decode_step(query * weight, *rest), inputs(), grad=True)
    assert "need a gradient" in captured.reason


def test_mask_that_does_not_broadcast_is_refused():
    gm = captured_graph(decode_step)
    [sdpa] = [node for node in gm.graph.nodes if node.target is F.scaled_dot_product_attention]
    sdpa.kwargs["attn_mask"].meta["example_value"] = torch.empty(1, 1, 3, CAPACITY, device="meta")
    [site] = run_passes(gm).sites
    assert site.reason == "mask of shape (1, 1, 3, 256) does not broadcast to (1, 4, 1, 256)"


def test_graph_without_shapes_is_refused():
    gm = captured_graph(decode_step)
    for node in gm.graph.nodes:
        node.meta.pop("example_value", None)
    assert "stands between" in run_passes(gm).sites[0].reason


@pytest.mark.parametrize("mask_shape", [(1,), (4, 1), (1, 4, 1), (1, 1, 1)], ids=str)
def test_masks_that_broadcast_are_fused(mask_shape):
    query, key, value, mask, state = inputs()
    mask = mask.reshape(-1)[:CAPACITY].expand(*mask_shape, CAPACITY).contiguous()
    captured = Captured(decode_step, (query, key, value, mask, state))
    assert captured.report.rewritten == 1
    assert_same(captured)


def long_chunk(query, key, value, mask, state):
    """What InnerQCache does for a chunk that is too long for the fused op."""
    keys, values = dequantize(state)
    slot = torch.arange(key.shape[2]) + state.counts[0, 0]
    keys, values = keys.index_copy(2, slot, key), values.index_copy(2, slot, value)
    append(key, value, state)
    return attend(query, keys, values, mask)


def test_long_chunk_attends_through_sdpa():
    captured = Captured(long_chunk, inputs(q_len=CONFIG.max_fused_q_len + 1))
    assert captured.after == captured.before
    assert (captured.report.found, captured.report.left) == (0, 1)
    assert captured.reason == "chunk of more than 32 query tokens: attends through SDPA"


def test_long_query_on_the_pattern_attends_through_sdpa():
    captured = Captured(decode_step, inputs(q_len=CONFIG.max_fused_q_len + 1))
    assert captured.after == captured.before
    assert captured.reason == "chunk of more than 32 query tokens: attends through SDPA"


def prefill(query, key, value, mask, state):
    append(key, value, state)
    return attend(query, key, value, None, is_causal=True)


def test_prefill_attends_to_itself():
    captured = Captured(prefill, inputs(q_len=7))
    assert captured.after == captured.before and (captured.report.found, captured.report.left) == (0, 1)
    assert captured.reason == "prefill: attends to its own exact keys and values"


class Layer(torch.nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, *arguments):
        return self.step(*arguments)


class Stack(torch.nn.Module):
    """Three layers with a cache each; the middle one is a near miss."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(decode_step), Layer(foreign_op), Layer(decode_step)])

    def forward(self, query, key, value, mask, states):
        for layer, state in zip(self.layers, states, strict=True):
            query = layer(query, key, value, mask, state)
        return query


def test_report_names_the_layers_and_counts_them():
    query, key, value, mask, _ = inputs()
    captured = Captured(Stack(), (query, key, value, mask, tuple(filled_state() for _ in range(3))))
    assert captured.before == {"dequantize": 3, "sdpa": 3, "fused": 0}
    assert captured.after == {"dequantize": 1, "sdpa": 1, "fused": 2}
    report = captured.report
    assert [site.path for site in report.sites] == ["layers.0", "layers.1", "layers.2"]
    assert [site.status for site in report.sites] == ["rewritten", "refused", "rewritten"]
    assert torch.allclose(captured.got, captured.expected, atol=1e-4)


def test_passes_run_twice_change_nothing_more():
    captured = Captured(decode_step, inputs())
    [gm] = captured.graphs
    code = gm.code
    assert run_passes(gm) == Report() and gm.code == code


def exported(step):
    torch._dynamo.reset()
    with torch.no_grad():
        program = torch.export.export(Layer(step), inputs(), strict=False)
    return program.module()


@pytest.mark.parametrize(
    "step", [decode_step, grouped, interleaved, eager_llama, eager_falcon], ids=lambda step: step.__name__
)
def test_exported_dialect_is_fused(step):
    gm = exported(step)
    assert run_passes(gm).rewritten == 1
    assert sum(node.target is ops.decode_attention for node in gm.graph.nodes) == 1
    assert not any("scaled_dot_product" in str(node.target) for node in gm.graph.nodes)
    assert not any("softmax" in str(node.target) for node in gm.graph.nodes)


def test_exported_near_miss_is_refused():
    assert run_passes(exported(foreign_op)).refused == 1


class TestVerify:
    def site(self):
        gm = captured_graph(decode_step)
        [site] = match(gm.graph)
        assert isinstance(site, DecodeSite)
        return gm, site

    def test_finds_a_site_that_was_not_rewritten(self):
        gm, site = self.site()
        report = Report((SiteReport(site.path, "rewritten"),))
        with pytest.raises(PassError, match=f"internal error at {site.path}: .*survived the rewrite"):
            verify(gm, [site], report)

    def test_finds_a_cache_in_full_precision(self):
        gm, site = self.site()
        run_passes(gm)
        [fused] = [node for node in gm.graph.nodes if node.target is ops.decode_attention]
        whole = torch.empty(1, 2, CAPACITY, HEAD_DIM, device="meta")
        with gm.graph.inserting_before(fused):
            node = gm.graph.call_method("view", (fused.args[1], *whole.shape))
        node.meta["example_value"] = whole
        with pytest.raises(PassError, match="holds the cache in full precision"):
            verify(gm, [site], Report((SiteReport(site.path, "rewritten"),)))

    def test_finds_counts_that_differ(self):
        gm, _ = self.site()
        with pytest.raises(PassError, match="1 dequantize_kv nodes, report of 0 rewritten and 0 kept"):
            verify(gm, [], Report())


class TestReport:
    report = Report((SiteReport("layers.0", "rewritten"), SiteReport("layers.1", "refused", "no mask")))

    def test_adds_up(self):
        total = self.report + Report((SiteReport("layers.2", "left", "16 bit"),), "a note")
        assert (total.found, total.rewritten, total.refused, total.left, total.note) == (2, 1, 1, 1, "a note")
        assert sum([self.report, self.report], Report()).found == 4

    def test_text_holds_counts_paths_and_reasons(self):
        text = str(self.report)
        assert text.startswith("2 sites found: 1 rewritten, 1 refused") and "layers.1" in text and "no mask" in text

    def test_json(self):
        assert self.report.to_json() == {
            "found": 2,
            "rewritten": 1,
            "refused": 1,
            "left": 0,
            "sites": [
                {"path": "layers.0", "status": "rewritten", "reason": ""},
                {"path": "layers.1", "status": "refused", "reason": "no mask"},
            ],
            "note": "",
        }
