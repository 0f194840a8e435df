"""The table of supported models: what docs/models.md shows is what was measured, and what was measured still holds."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from innerq_compile import InnerQCache
from innerq_compile.passes.decode import run_passes

ROOT = Path(__file__).resolve().parent.parent


sys.path.append(str(ROOT / "benchmarks"))
import family_sweep  # noqa: E402
import support_matrix as matrix  # noqa: E402

sys.path.pop()

ROWS = {row.model: row for row in matrix.load()}


def test_every_family_is_there_and_computes_the_same():
    assert list(ROWS) == list(matrix.MODELS)
    for row in ROWS.values():
        assert row.same_tokens and row.within_budget, row.model


def test_what_is_not_rewritten_has_a_reason():
    for row in ROWS.values():
        assert sum(row.kept.values()) == row.layers - row.quantized and all(row.kept)
        for sites in row.sites.values():
            assert sites.found == row.quantized
            assert sites.rewritten + sites.refused == sites.found and bool(sites.refused) == bool(sites.reasons)


def test_document_shows_the_result():
    text = matrix.DOCUMENT.read_text(encoding="utf-8")
    tables = (matrix.table(ROWS.values()), family_sweep.table(matrix.load_families()))
    assert all(table in text for table in tables)
    assert matrix.document(text, ROWS.values(), matrix.load_families()) == text


# One of each kind: a hybrid of windows, soft-capping, sinks, latent attention, each dialect of eager attention.
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 3", "Gemma 2", "GPT-2", "Falcon", "gpt-oss", "DeepSeek-V3"])
def test_survey_still_finds_what_was_measured(name):
    measured = dataclasses.replace(ROWS[name], same_tokens=None, logits_error=None, logits_budget=None)
    found = matrix.survey(name)
    if name == "Gemma 2" and "sdpa" in found.sites:  # transformers 5.17 offers it without the soft-capping it lacks
        assert found.used == "sdpa" and found.sites.pop("sdpa").rewritten == found.quantized
        found = dataclasses.replace(found, used="eager")
    assert found == measured


@pytest.mark.parametrize("name", ["Gemma 3", "OPT"])
def test_rewritten_graph_generates_the_same_tokens(name, monkeypatch):
    monkeypatch.setattr(matrix, "NEW_TOKENS", 40)
    model = matrix.make_model(matrix.make_config(name))
    expected = matrix.generate(model)
    rewritten = []

    def backend(gm, example_inputs):
        rewritten.append(run_passes(gm, exact=True).rewritten)
        return gm.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    assert torch.equal(matrix.generate(model), expected)
    assert sum(rewritten) == ROWS[name].quantized


def test_hybrid_keeps_16_bits_only_where_windows_slide():
    config = matrix.make_config("Gemma 3")
    cache = InnerQCache(config, max_cache_len=matrix.CAPACITY)
    sliding = {index for index, kind in enumerate(config.layer_types) if kind == "sliding_attention"}
    assert set(cache.unquantized) == sliding and len(sliding) < len(cache.layers)
