"""The rewrites as optimum transformations; skips itself where optimum is not installed."""

import copy

import pytest
import torch
from torch import nn

optimum = pytest.importorskip("optimum.fx.optimization")

from innerq_compile import InnerQCache, ops  # noqa: E402  only where optimum is there
from innerq_compile.key_norm.optimum_fx import FoldKeyNorm, FuseDecodeAttention  # noqa: E402

TOKENS = torch.randint(1, 256, (1, 48), generator=torch.Generator().manual_seed(0))


class MarkNodes(optimum.Transformation):
    """Another transformation to compose with."""

    preserves_computation = True

    def transform(self, graph_module):
        for node in graph_module.graph.nodes:
            self.mark_as_transformed(node)
        return graph_module


class Decode(nn.Module):
    """One layer that reads and extends a cache."""

    def __init__(self, cache: InnerQCache) -> None:
        super().__init__()
        self.layer = cache.layers[0]

    def forward(self, query, key, value, mask):
        keys, values = self.layer.update(key, value)
        return nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


@pytest.fixture
def program(tiny_model):
    with torch.no_grad():
        return torch.export.export(tiny_model, (TOKENS,), {"use_cache": False}, strict=False)


def test_fold_is_composed_and_reversed_bit_for_bit(program) -> None:
    gm = copy.deepcopy(program.module())
    before, expected = {k: v.clone() for k, v in gm.state_dict().items()}, gm(TOKENS, use_cache=False).logits
    fold = FoldKeyNorm([(TOKENS,)], strength=1.0)
    gm = optimum.compose(fold, MarkNodes())(gm)
    assert any(not torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    torch.testing.assert_close(gm(TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(fold.signature, int)
    fold(gm, reverse=True)
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    with pytest.raises(ValueError, match="nothing to reverse"):
        fold(gm, reverse=True)


def test_fusion_is_composed_and_reversed(tiny_config) -> None:
    cache = InnerQCache(tiny_config, max_cache_len=256)
    head = torch.zeros(1, 2, 1, 32)
    cache.layers[0].update(head, head)
    mask = torch.ones(1, 1, 1, 256, dtype=torch.bool)
    graphs = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Decode(cache), backend=lambda gm, _: (graphs.append(gm), gm.forward)[1])(head, head, head, mask)
    (gm,) = graphs
    fuse = FuseDecodeAttention()
    optimum.compose(fuse, MarkNodes())(gm)
    assert gm.graph.find_nodes(op="call_function", target=ops.decode_attention)
    fuse(gm, reverse=True)
    assert not gm.graph.find_nodes(op="call_function", target=ops.decode_attention)
    assert gm.graph.find_nodes(op="call_function", target=ops.dequantize_kv)
