"""The command line, as a user types it."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from innerq_compile.cli import app
from innerq_compile.demo.run import MODEL_DIR


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def model_dir(tmp_path, tiny_model):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(97 + i): i for i in range(26)} | {" ": 26, "?": 27}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tiny_model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("abcdefgh " * 30)
    return tmp_path / "model"


def test_env_names_versions_devices_and_compiler():
    facts = json.loads(run("env", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert set(facts) >= {"innerq_compile", "python", "transformers", "cpu", "gpu", "c++ compiler", "cpu kernels"}
    assert facts["cpu kernels"].startswith(("C++ for ", "reference, because "))
    assert "c++ compiler" in run("env").stdout


@pytest.mark.slow
def test_generate_writes_what_full_precision_writes_with_eight_bits(model_dir):
    common = ("--model", model_dir, "--prompt-file", model_dir.parent / "prompt.txt", "--max-new-tokens", 8, "--json")
    quantized = json.loads(run("generate", *common, "--preset", "int8").stdout)
    full = json.loads(run("generate", *common, "--full-precision").stdout)
    assert quantized["text"] == full["text"] and quantized["new_tokens"] == full["new_tokens"] == 8
    assert quantized["prompt_tokens"] == 270
    assert quantized["cache_bytes"] < full["cache_bytes"]


def test_explain_lists_every_layer(model_dir):
    report = json.loads(run("explain", "--model", model_dir, "--json").stdout)
    assert (report["found"], report["rewritten"], report["refused"]) == (2, 2, 0)
    assert set(report["kernels"]) >= {"cpu kernels"}
    text = run("explain", "--model", model_dir).stdout
    assert "2 rewritten" in text and f"cpu kernels: {report['kernels']['cpu kernels']}" in text


@pytest.mark.parametrize(
    "arguments",
    [("demo", "--preset", "tiny"), ("explain", "--model", MODEL_DIR, "--preset", "tiny")],
)
def test_a_bad_preset_is_one_line_and_exit_code_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "preset must be one of base, small" in result.output and "Traceback" not in result.output


@pytest.mark.long
@pytest.mark.slow
def test_demo_measures_every_cache_and_shows_what_it_wrote():
    arguments = ("demo", "--preset", "base", "--prompt-tokens", 1024, "--measured-tokens", 16, "--json")
    result = run(*arguments)
    assert result.exit_code == 0, result.exception
    rows = json.loads(result.stdout)["rows"]
    assert [row["cache"] for row in rows] == ["full precision", "StaticCache + Inductor", "base"]
    full, _, base = rows
    assert full["kl"] == 0.0 and full["agreement"] == 1.0 and full["ratio"] == 1.0
    assert base["kl"] > 0.0 and base["ratio"] > 2.0 and base["tokens_per_second"] > 0.0
    assert all(row["text"] for row in rows)
