"""How the Triton kernels attach to the ops: lazily, and not at all where there is no Triton."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from innerq_compile.kernels import triton as triton_kernels


def test_importing_ops_and_kernels_loads_no_triton() -> None:
    # Compared with what torch loads by itself: up to 2.11 its Dynamo imports Triton where it is installed.
    program = (
        "import sys, torch._dynamo; before = 'triton' in sys.modules\n"
        "import innerq_compile.ops, innerq_compile.kernels.triton\n"
        "sys.exit(before != ('triton' in sys.modules) or 'innerq_compile.kernels.triton.launch' in sys.modules)"
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


ON_A_GPU = """
import torch, triton
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from innerq_compile import ops
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.kernels import triton as kernels
from innerq_compile.numerics.layout import allocate_state


class Driver:  # what Triton asks of a GPU to translate a kernel, which tells torch what the kernel writes
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Driver())
kernels.is_on_gpu = lambda args: True
kernels.register_decompositions()
config, capacity = InnerQConfig(), 1024
"""


def printed_on_a_gpu(program):
    """Lines that a program prints in a process of its own, where kernels are compiled and ops believe in a GPU."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", ON_A_GPU + program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


TRACE = """
def step(key, value, *state):
    ops.append_kv(key, value, *state, capacity, config.spec)
    return ops.dequantize_kv(*state, capacity, config.spec)


def show(gm, inputs):
    for node in gm.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            print(*sorted(node.kwargs["tensors_to_clone"]))
        elif node.op == "call_function" and "getitem" not in str(node.target):
            print(node.target)
    return make_boxed_func(gm.forward)


with FakeTensorMode(), torch.no_grad():
    state = allocate_state(config, batch_size=1, num_kv_heads=2, head_dim=64, capacity=capacity, dtype=torch.bfloat16,
                           device="cpu")
    key = torch.empty(1, 2, 1, 64, dtype=torch.bfloat16)
    aot_function(step, fw_compiler=show)(key, key.clone(), *state)
"""


def test_a_graph_for_inductor_holds_the_kernels_and_what_they_write() -> None:
    """A decode step: one kernel that changes the buffers it should, then one that writes two new tensors."""
    written = "counts_ptr k_codes_ptr k_scales_ptr k_window_ptr key_center_ptr key_norm_ptr v_codes_ptr v_scales_ptr"
    assert printed_on_a_gpu(TRACE) == [
        f"{written} v_window_ptr", "aten.new_empty.default", "aten.new_empty.default", "keys_ptr values_ptr"
    ]  # fmt: skip


SYMBOLIC = """
def step(query, key, value, mask, *state):
    ops.append_kv(key, value, *state, capacity, config.spec)
    return ops.decode_attention(query, *state, mask, 0.125, capacity, config.spec)


class Seen(BaseException):
    pass


def show(gm, inputs):
    for node in gm.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            print(*sorted(node.kwargs["tensors_to_clone"]))
            assert not isinstance(node.kwargs["grid"][0][1], int)
    raise Seen


state = allocate_state(config, batch_size=2, num_kv_heads=2, head_dim=64, capacity=capacity, dtype=torch.bfloat16,
                       device="cpu")
inputs = [torch.empty(2, heads, 1, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)]
inputs += [torch.ones(2, 1, 1, capacity, dtype=torch.bool), *state]
for tensor in inputs:
    if tensor.dim() > 1:
        torch._dynamo.mark_dynamic(tensor, 0)
try:
    with torch.no_grad():
        torch.compile(step, backend=aot_autograd(fw_compiler=show), fullgraph=True)(*inputs)
except Seen:
    pass
"""


def test_one_graph_of_kernels_serves_every_batch_size() -> None:
    """What torch makes of a second batch size in a process: sizes are symbols, also to the launchers."""
    append, attention, combine = printed_on_a_gpu(SYMBOLIC)
    assert "k_codes_ptr" in append
    assert (attention, combine) == ("stats_ptr sums_ptr", "out_ptr")
