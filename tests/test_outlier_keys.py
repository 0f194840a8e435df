"""Keys with outlier channels at 3 bits: the key norm recovers what they cost, at run time and folded."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from innerq_compile.demo.run import MODEL_DIR
from innerq_compile.passes.key_norm.check_fold import MAX_RELATIVE_ERROR

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_normalized_keys_lose_no_more_with_outliers_than_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function twice: the reference model, and a copy whose keys are up to 64 times as large here and there.

    KL against the undamaged model in full precision, of 128 tokens behind a prompt that is long enough for a center.
    """
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_key_norm")
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    text = bench.read_text(MODEL_DIR, argparse.Namespace(context=640, chunk=128, prompts=1))
    text.calibration = text.calibration[:1024]  # the recorded figures took four times as much
    plain = bench.Study(model, text)
    damaged = bench.Study(bench.with_outliers(model, *bench.STRESS[0]), text, plain.full)
    assert damaged.drift < MAX_RELATIVE_ERROR

    def nats(study, variant) -> float:
        return study.kl(variant, [3])["3"][0]

    run_time, off = bench.Variant("run time", {}), bench.Variant("off", {"key_norm": "off"})
    for norm in (run_time, bench.folded("as shipped", {})):
        assert nats(damaged, norm) <= 1.1 * nats(plain, norm)
    assert nats(damaged, off) > 100 * nats(plain, off)
