"""How the Triton kernels attach to the ops: lazily, and not at all where there is no Triton."""

import subprocess
import sys
import warnings

import pytest
import torch

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
    for name in [name for name in sys.modules if name.startswith("innerq_compile.kernels.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    triton_kernels.unavailable.cache_clear()
    yield
    triton_kernels.unavailable.cache_clear()


def test_without_triton_one_warning_says_that_the_reference_runs(no_triton) -> None:
    with pytest.warns(UserWarning, match="Triton kernels are off .* Triton cannot be imported"):
        assert "cannot be imported" in triton_kernels.unavailable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton_kernels.unavailable()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("innerq::append_kv", "CUDA")


def test_with_triton_the_kernels_stand_under_the_device_key() -> None:
    program = (
        "import torch; from innerq_compile.kernels import triton; assert triton.unavailable() is None\n"
        "for name in triton.OPS:\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'innerq::{name}', 'CUDA')"
    )
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
