"""The programs in examples/ run on the reference model and do what their first lines say."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODEL = ROOT / "innerq_compile" / "demo" / "model"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example with arguments and gives what it printed. Uncompiled: that costs minutes and changes nothing."""
    monkeypatch.chdir(ROOT)

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name))
        return capsys.readouterr().out

    with torch._dynamo.config.patch(disable=True):
        yield call


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_and_says_how_it_is_started(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f"examples/{path.name}" in text.split('"""')[1]


@pytest.mark.slow
def test_a_chat_that_is_resumed_goes_on_as_if_it_had_not_stopped(run, tmp_path):
    turns = ["def add(a, b):\n    return a + b\n" * 12, "def multiply(a, b):"]  # more than 160 tokens: some are packed
    how = ("--new-tokens", 8)
    whole = run("chat.py", *turns, "--folder", tmp_path / "whole", *how)
    first = run("chat.py", turns[0], "--folder", tmp_path / "parts", *how)
    second = run("chat.py", turns[1], "--folder", tmp_path / "parts", *how)
    assert first + second == whole
    kept = [json.loads((tmp_path / name / "tokens.json").read_text()) for name in ("whole", "parts")]
    assert kept[0] == kept[1] and len(kept[0]) > 160


@pytest.mark.slow
def test_a_long_document_is_asked_for_a_number_far_back(run):
    said = run("long_document.py", "--tokens", 1200)
    assert "48213" in said.partition("MB\n")[2]


@pytest.mark.slow
def test_a_row_of_a_batch_gives_what_it_gives_alone(run):
    prompts = ["import os", "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):"]
    together = run("batch.py", *prompts, "--new-tokens", 8)
    assert together == "".join(run("batch.py", prompt, "--new-tokens", 8) for prompt in prompts)
