"""Lets torch and Inductor believe in an H100, so that they write the code that they would run there. None of it runs.

``pretend()`` replaces, for the rest of the process, whatever asks a driver: works with torch's CPU build too.
"""

import ctypes
import os
import subprocess
import tempfile
import types
from pathlib import Path

import torch
from torch import _inductor as inductor
from torch._dynamo import device_interface
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
)

NO_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static impl::DeviceGuardImplRegistrar no_guard(DeviceType::CUDA, new impl::NoOpDeviceGuardImpl<DeviceType::CUDA>());
"""


class _Driver:
    """What Triton asks of a GPU to translate a kernel."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


class _Worker(device_interface.CudaInterface.Worker):
    @staticmethod
    def get_device_properties(device=None):
        return H100

    @staticmethod
    def current_device():
        return 0


class _Interface(device_interface.CudaInterface):
    Worker = _Worker
    is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    get_compute_capability = staticmethod(lambda device=None: 90)
    get_device_properties = staticmethod(lambda device=None: H100)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    synchronize = staticmethod(lambda device=None: None)


def pretend() -> None:
    """Puts the stand-ins in place. Fake CUDA tensors only: a real one still fails."""
    import triton

    triton.runtime.driver.set_active(_Driver())
    _remove_device_guard()
    torch.cuda.get_device_properties = lambda device=None: H100
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.is_current_stream_capturing = lambda: False
    inductor.config.joint_graph_constant_folding = False  # computes on the device
    inductor.config.shape_padding = False  # times on the device
    device_interface.get_registered_device_interfaces()
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, _Interface)


def fake_model(config, dtype=torch.bfloat16):
    """A model of fake CUDA tensors, and the mode that they belong to."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, x in tensors.items():
                    if x is not None:
                        x = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                        tensors[name] = torch.nn.Parameter(x, False) if tensors is module._parameters else x
    return model, mode


def _remove_device_guard() -> None:
    """Every indexing of a fake CUDA tensor would call the driver, or fail where torch is not built for CUDA."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "no_guard.so")
        command = [get_cpp_compiler(), "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
        command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"]
        subprocess.run(command, input=NO_GUARD.encode(), check=True)
        ctypes.CDLL(library)
