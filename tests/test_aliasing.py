"""What may be moved past what in a graph: mutations through any alias are seen, and nothing else is in the way."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.passes.aliasing import Memory
from innerq_compile.passes.decode.capture_static_cache import capture_static_cache

CAPACITY, HEADS, HEAD_DIM = 64, 2, 32
CONFIG = InnerQConfig.from_preset("int8", sink=32, recent=32)


def arguments():
    generator = torch.Generator().manual_seed(0)
    keys, values = (x.clone() for x in torch.randn(2, 1, HEADS, CAPACITY, HEAD_DIM, generator=generator))
    # Each in memory of its own: slices of one tensor count as one.
    query, key, value = (x.clone() for x in torch.randn(3, 1, HEADS, 1, HEAD_DIM, generator=generator))
    mask = (torch.arange(CAPACITY) <= 40)[None, None, None]
    return {
        "keys": keys,
        "values": values,
        "query": query,
        "key": key,
        "value": value,
        "position": torch.tensor([40]),
        "mask": mask,
        "other": torch.ones(3),
    }


def decode(before=lambda t: None, between=lambda seen, t: None, after=lambda t: None):
    """A step over a static cache, with something of the caller's at three places."""

    def step(t):
        seen = before(t)
        t["keys"].index_copy_(2, t["position"], t["key"])
        t["values"].index_copy_(2, t["position"], t["value"])
        between(seen, t)
        out = F.scaled_dot_product_attention(t["query"], t["keys"], t["values"], attn_mask=t["mask"])
        after(t)
        return out

    return step


def run(step):
    """(what the capture says of the site, outputs and everything that was changed, with and without the backend)"""
    sites = []

    def backend(gm, example_inputs):
        report, _ = capture_static_cache(gm.graph, CONFIG, exact=True)
        sites.extend(report.sites)
        gm.recompile()
        return gm.forward

    plain, captured = arguments(), arguments()
    torch._dynamo.reset()
    with torch.no_grad():
        expected, found = step(plain), torch.compile(step, backend=backend, fullgraph=True)(captured)
    [site] = sites
    return site, (expected, plain), (found, captured)


def views_of(name):
    """Every way to look at a tensor [1, 2, 1, 32] that a schema calls an alias, and some that none does."""
    ways = {
        "itself": lambda x: x,
        "contiguous": lambda x: x.contiguous(),
        "view_as": lambda x: x.view_as(x),
        "to": lambda x: x.to(torch.float32),
        "float": lambda x: x.float(),
        "type_as": lambda x: x.type_as(x),
        "swapaxes": lambda x: x.swapaxes(1, 2),
        "expand_as": lambda x: x.expand_as(x),
        "unflatten": lambda x: x.unflatten(3, (4, 8)),
        "flatten": lambda x: x.flatten(1),
        "chunk": lambda x: x.chunk(2, 3)[1],
        "split": lambda x: torch.split(x, 16, dim=3)[0],
        "squeeze": lambda x: torch.squeeze(x, 2),
        "movedim": lambda x: torch.movedim(x, 1, 0),
        "diagonal": lambda x: x.diagonal(0, 1, 3),
        "unbind": lambda x: x.unbind(1)[0],
        "narrow": lambda x: x.narrow(3, 0, 4),
        "mT": lambda x: x.mT,
        "dropout that does nothing": lambda x: F.dropout(x, 0.5, training=False),
        "a view of a view": lambda x: x.reshape(-1).view(2, 32).T,
    }
    return [pytest.param(lambda t, way=way: way(t[name]), id=f"{name}: {label}") for label, way in ways.items()]


@pytest.mark.parametrize("before", [*views_of("key"), *views_of("value")[:2]])
def test_a_mutation_through_any_view_keeps_the_write_where_it_stands(before):
    site, (expected, plain), (found, captured) = run(decode(before, lambda seen, t: seen.mul_(0)))
    assert site.status == "left" and "mul_ stands between the write and the attention" in site.reason
    assert torch.equal(found, expected)
    assert all(torch.equal(captured[name], plain[name]) for name in plain)


def out_argument(seen, t):
    torch.add(t["key"], 1.0, out=t["key"])


def item_assignment(seen, t):
    t["key"][..., 0] = 5.0


def operator_in_place(seen, t):
    t["key"] *= 2.0


def flag_in_place(seen, t):
    F.relu(t["key"], inplace=True)


def method_with_a_source(seen, t):
    t["value"].copy_(t["key"])


def position_moves_on(seen, t):
    t["position"].add_(1)


def custom_op(seen, t):
    torch.ops.aten.fill_.Scalar(t["key"], 3.0)


@pytest.mark.parametrize(
    "between",
    [
        out_argument,
        item_assignment,
        operator_in_place,
        flag_in_place,
        method_with_a_source,
        position_moves_on,
        custom_op,
    ],
)
def test_every_spelling_of_a_mutation_is_seen(between):
    site, (expected, plain), (found, captured) = run(decode(between=between))
    assert site.status == "left"
    assert torch.equal(found, expected)
    assert all(torch.equal(captured[name], plain[name]) for name in plain)


def attend_to_a_copy_made_before_the_write(t):
    copies = [t[name][:, :, None].expand(1, HEADS, 2, CAPACITY, HEAD_DIM) for name in ("keys", "values")]
    copies = [copy.reshape(1, 2 * HEADS, CAPACITY, HEAD_DIM) for copy in copies]
    t["keys"].index_copy_(2, t["position"], t["key"])
    t["values"].index_copy_(2, t["position"], t["value"])
    return F.scaled_dot_product_attention(t["query"].repeat(1, 2, 1, 1), *copies, attn_mask=t["mask"])


def attend_before_the_write(t):
    out = F.scaled_dot_product_attention(t["query"], t["keys"], t["values"], attn_mask=t["mask"])
    t["keys"].index_copy_(2, t["position"], t["key"])
    t["values"].index_copy_(2, t["position"], t["value"])
    return out


def attend_twice_to_the_same_views(t):
    t["keys"].index_copy_(2, t["position"], t["key"])
    t["values"].index_copy_(2, t["position"], t["value"])
    keys, values = (
        t[name][:, :, None].expand(1, HEADS, 2, CAPACITY, HEAD_DIM).reshape(1, 2 * HEADS, CAPACITY, HEAD_DIM)
        for name in ("keys", "values")
    )
    query = t["query"].repeat(1, 2, 1, 1)
    first = F.scaled_dot_product_attention(query, keys, values, attn_mask=t["mask"])
    return F.scaled_dot_product_attention(first, keys, values, attn_mask=t["mask"])


def buffer_changes_through_a_view(t):
    t["keys"].index_copy_(2, t["position"], t["key"])
    t["values"].index_copy_(2, t["position"], t["value"])
    t["keys"].narrow(2, 0, 3).zero_()
    return F.scaled_dot_product_attention(t["query"], t["keys"], t["values"], attn_mask=t["mask"])


@pytest.mark.parametrize("step", [attend_to_a_copy_made_before_the_write, attend_before_the_write])
def test_attention_to_what_was_there_before_the_write_is_left(step):
    site, (expected, plain), (found, captured) = run(step)
    assert site.status == "left"
    assert torch.equal(found, expected) and torch.equal(captured["keys"], plain["keys"])


def test_a_buffer_that_changes_through_a_view_is_left():
    site, (expected, _), (found, _) = run(buffer_changes_through_a_view)
    assert site.status == "left" and torch.equal(found, expected)


def test_views_of_a_buffer_that_two_attentions_read_are_left():
    sites = []

    def backend(gm, example_inputs):
        sites.extend(capture_static_cache(gm.graph, CONFIG, exact=True)[0].sites)
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = attend_twice_to_the_same_views(arguments())
        found = torch.compile(attend_twice_to_the_same_views, backend=backend, fullgraph=True)(arguments())
    assert [site.status for site in sites] == ["left", "left"] and torch.equal(found, expected)


def mutation_behind_the_attention(t):
    t["key"].mul_(0)
    t["position"].add_(1)


def mutation_of_something_else(seen, t):
    t["other"].mul_(2)
    t["other"][0] = 7.0


def mutation_of_a_copy(seen, t):
    t["key"].clone().mul_(0)
    (t["key"] * 2).zero_()


def mask_changes_before_it_is_read(seen, t):
    t["mask"][..., :3] = False


def query_changes_before_it_is_read(seen, t):
    t["query"].mul_(2.0)


@pytest.mark.parametrize(
    "step",
    [
        decode(),
        decode(after=mutation_behind_the_attention),
        decode(between=mutation_of_something_else),
        decode(between=mutation_of_a_copy),
        decode(between=mask_changes_before_it_is_read),
        decode(between=query_changes_before_it_is_read),
    ],
    ids=["nothing", "behind", "something else", "a copy", "mask", "query"],
)
def test_what_changes_nothing_that_moves_is_not_in_the_way(step):
    site, (expected, plain), (found, captured) = run(step)
    assert site.status == "rewritten"
    torch.testing.assert_close(found, expected)  # all tokens lie in the 16-bit windows
    assert all(torch.equal(captured[name], plain[name]) for name in plain)


def foreign(x):
    return None


class TestWithoutFakeTensors:
    """Graphs built by hand: the schemas alone must do."""

    @staticmethod
    def conflict(build):
        graph = fx.Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        begin = graph.call_function(torch.relu, (y,))
        build(graph, x, y)
        end = graph.output(begin)
        return Memory(graph).conflict(after=begin, before=end, reads=(x,))

    @pytest.mark.parametrize(
        "view",
        ["contiguous", "float", "type_as", "view_as", "swapaxes", "expand_as", "ravel", "sum_to_size", "detach"],
    )
    def test_views(self, view):
        assert self.conflict(lambda g, x, y: g.call_method("add_", (g.call_method(view, (x, y)), 1))) is not None

    @pytest.mark.parametrize("target", [foreign, torch.cond, torch.ops.aten.fill_])
    def test_what_nobody_describes_may_write(self, target):
        assert self.conflict(lambda g, x, y: g.call_function(target, (x, y))) is not None

    def test_a_module_may_do_anything(self):
        assert self.conflict(lambda g, x, y: g.call_module("layer", (y,))) is not None

    @pytest.mark.parametrize("target", [torch.add, operator.add, operator.le, torch.ops.aten.mul.Tensor, F.linear])
    def test_results_that_are_new_are_nobody_elses(self, target):
        assert self.conflict(lambda g, x, y: g.call_method("zero_", (g.call_function(target, (x, y)),))) is None

    def test_a_place_that_stands_before_the_other_is_refused(self):
        graph = fx.Graph()
        x = graph.placeholder("x")
        first, second = graph.call_function(torch.relu, (x,)), graph.call_function(torch.relu, (x,))
        assert Memory(graph).conflict(after=second, before=first, reads=(x,)) is first
