"""The sweep over every causal family: its table shows what was measured, and what was measured still holds."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import families  # noqa: E402
import family_sweep  # noqa: E402
import support_matrix as matrix  # noqa: E402

sys.path.pop()

MEASURED = {family.model_type: family for family in matrix.load_families()}


def test_every_family_has_an_outcome_and_none_is_broken():
    recorded = json.loads(matrix.RESULT.read_text(encoding="utf-8"))["environment"]["transformers"]
    if recorded == transformers.__version__:
        assert sorted(MEASURED) == list(families.MODEL_TYPES)
    for family in MEASURED.values():
        assert family.outcome in family_sweep.OUTCOMES and family.outcome != family_sweep.BROKEN, family
        assert bool(family.reason) == (family.outcome != family_sweep.WORKS or family.rewritten < family.quantized)
        if family.error is not None:
            assert family.error <= family.budget, family


# Refusals by numbers, code and configuration, an error of the model's own, and layers of two kinds, rewritten.
@pytest.mark.parametrize("model_type", ["bloom", "falcon_mamba", "deepseek_v4", "gemma4_unified_assistant", "exaone4"])
def test_survey_still_finds_what_was_measured(model_type):
    if model_type not in families.MODEL_TYPES:
        pytest.skip("this version of transformers does not have it")
    found = family_sweep.survey(model_type)
    measured = MEASURED[model_type]
    assert dataclasses.replace(found, error=None, budget=None) == dataclasses.replace(measured, error=None, budget=None)


def test_a_fault_is_called_broken(monkeypatch):
    monkeypatch.setattr(family_sweep, "enable", lambda model, **kwargs: [][0])
    found = family_sweep.survey("llama")
    assert found.outcome == family_sweep.BROKEN and found.reason.startswith("enable() raises IndexError")
