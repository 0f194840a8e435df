"""What ``innerq eval`` reports: hand-worked distributions, and caches whose cost is known."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from innerq_compile import InnerQCache
from innerq_compile.cli import app
from innerq_compile.evaluation.quality import SEGMENT, Quality, measure, standard_error
from innerq_compile.evaluation.texts import TEXTS, read_text


def test_two_token_distributions_by_hand():
    # p = (3/4, 1/4), q = (1/4, 3/4): KL = 3/4 log 3 + 1/4 log 1/3 = log(3) / 2. The true token is the first.
    full, quantized = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()
    found = Quality()
    found.add(quantized, full, torch.tensor([0]))
    found.add(full, full, torch.tensor([1]))
    assert found.kl == pytest.approx([math.log(3) / 2, 0.0])
    assert found.loss == pytest.approx([math.log(4), math.log(4)])
    assert found.full_loss == pytest.approx([math.log(4 / 3), math.log(4)])
    assert found.agrees == [False, True]
    summary = found.summary(last=1)
    assert summary["kl"] == pytest.approx(math.log(3) / 4) and summary["kl_last"] == pytest.approx(0.0)
    assert summary["perplexity"] == pytest.approx(4.0)
    assert summary["perplexity_change"] == pytest.approx(math.sqrt(3) - 1)  # exp of half of log 3
    assert summary["agreement"] == 0.5


def test_standard_error_is_that_of_segment_means():
    samples = torch.cat([torch.full((SEGMENT,), 1.0), torch.full((SEGMENT,), 3.0), torch.full((7,), 1e9)]).double()
    assert standard_error(samples) == pytest.approx(1.0)  # means 1 and 3, standard deviation sqrt(2)
    assert math.isnan(standard_error(samples[: SEGMENT + 1]))


def test_cost_is_zero_where_nothing_is_quantized_and_grows_as_bits_shrink(tiny_model):
    ids = torch.randint(1, 256, (1, 400), generator=torch.Generator().manual_seed(0))
    settings = {"wide": {"recent": 512}, "int8": {"preset": "int8"}, "small": {"preset": "small"}}
    caches = {name: InnerQCache(tiny_model.config, max_cache_len=400, **given) for name, given in settings.items()}
    found = measure(tiny_model, ids, caches, prompt=200, progress=False)
    kl = {name: quality.summary()["kl"] for name, quality in found.items()}
    assert all(len(quality.kl) == 400 - 1 - 200 for quality in found.values())
    # Float32 logits of two ways to compute the same: KL is second order in their difference.
    assert abs(kl["wide"]) < torch.finfo(torch.float32).eps * math.log(256)
    assert kl["wide"] < kl["int8"] < kl["small"]


def test_text_that_leaves_nothing_to_score_is_refused(tiny_model):
    with pytest.raises(ValueError, match="100 tokens, a prompt of 99 leaves nothing"):
        measure(tiny_model, torch.ones(1, 100, dtype=torch.int64), {}, prompt=99)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_long_and_always_the_same(name):
    text, found = read_text(name)
    assert len(text) > 8 * 8192 and (text, found) == read_text(name)


def test_command_measures_a_directory_and_refuses_in_one_line():
    model = ["--model", "innerq_compile/demo/model", "--prompt-tokens", "200", "--preset", "small"]
    done = CliRunner().invoke(app, ["eval", *model, "--tokens", "264", "--text", "code", "--json"])
    row = json.loads(done.stdout)["rows"]["small"]
    assert 0 < row["kl"] < 0.1 and row["bits"] == 3.0 and row["bytes"] > 0
    for wrong, reason in (("no such text", "text must be one of api, manual, code or a file"),):
        done = CliRunner().invoke(app, ["eval", *model, "--text", wrong])
        assert done.exit_code == 2 and reason in done.output
    done = CliRunner().invoke(app, ["eval", *model, "--tokens", "100000", "--text", "code"])
    assert done.exit_code == 2 and "the model positions for 4096" in done.output
