"""How the Triton kernels attach to the ops: lazily, and not at all where there is no Triton."""

import subprocess
import sys
import warnings

import pytest

from innerq_compile import ops
from innerq_compile.kernels import triton as triton_kernels


def test_importing_and_registering_loads_no_triton() -> None:
    program = (
        "import sys, innerq_compile; from innerq_compile import InnerQCache\n"
        "import innerq_compile.kernels.triton as t; t.register(); t.register()\n"
        "sys.exit(any(name.split('.')[0] == 'triton' and 'innerq' not in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program]).returncode == 0


@pytest.fixture
def no_triton(monkeypatch):
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    for cached in (triton_kernels.unavailable, triton_kernels._tell_once_if_unavailable):
        cached.cache_clear()
    yield
    for cached in (triton_kernels.unavailable, triton_kernels._tell_once_if_unavailable):
        cached.cache_clear()


def test_without_triton_the_reference_runs_after_one_warning(no_triton, monkeypatch) -> None:
    monkeypatch.setitem(ops.DEFAULTS, "append_kv", lambda *args: ("reference", args))
    monkeypatch.setitem(ops.DEFAULTS, "dequantize_kv", lambda *args: ("reference", args))
    with pytest.warns(UserWarning, match="Triton kernels are off .* Triton cannot be imported"):
        assert triton_kernels._lazy("append_kv")(1, 2) == ("reference", (1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton_kernels._lazy("dequantize_kv")(3) == ("reference", (3,))
