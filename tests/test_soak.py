"""A short soak; ``make soak`` runs the long one, which also bounds memory."""

import importlib.util
import sys
from pathlib import Path

import pytest

from innerq_compile.compiler import backend

PROGRAM = Path(__file__).with_name("soak.py")


@pytest.mark.slow
@pytest.mark.skipif(not backend.cpp_compiler_works(), reason="needs a C++ compiler")
def test_cache_equals_the_reference_at_random_steps_and_nothing_recompiles():
    spec = importlib.util.spec_from_file_location("soak", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    seen = module.soak(tokens=500, checkpoints=3)
    assert len(seen.checkpoints) >= 3 and seen.cache_bytes[0] == seen.cache_bytes[1]
    assert seen.quantized >= 400 and seen.distinct > 20
