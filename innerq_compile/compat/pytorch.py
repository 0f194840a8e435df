"""What torch keeps to itself and this package needs. Each name says what public name is missing.

Nothing of Inductor or Dynamo is imported before a function here is called: that takes a second, and only compiling
needs it. :func:`check` asks for everything at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from innerq_compile.compat import private

TESTED = "2.11 to 2.13"

NAMES = (
    "torch._ops:OpOverload",
    "torch._ops:OpOverloadPacket",
    "torch._ops:HigherOrderOperator",
    "torch.ops:aten._assert_tensor_metadata.default",
    "torch._dynamo:mark_static_address",
    "torch._inductor:list_mode_options",
    "torch._inductor.config:get_config_copy",
    "torch._inductor.config:cpu_backend",
    "torch._inductor.compile_fx:compile_fx",
    "torch._inductor.cpp_builder:get_cpp_compiler",
    "torch._inductor.exc:InvalidCxxCompiler",
    "torch._subclasses:FakeTensor",
    "torch._subclasses.functional_tensor:FunctionalTensorMode",
    "torch.export._trace:custom_triton_ops_decomposition_disabled",
    "torch.fx.experimental.symbolic_shapes:statically_known_true",
    "torch.utils.weak:WeakTensorKeyDictionary",
)
"""Everything that this file takes from torch."""


def _torch(path: str) -> Any:
    return private("torch", torch.__version__, TESTED, path)


OpOverload = _torch("torch._ops:OpOverload")
"""Class of ``torch.ops.aten.add.Tensor``. Public: no name for it, though every exported graph is made of them."""

HigherOrderOperator = _torch("torch._ops:HigherOrderOperator")
"""Class of operators that take graphs, ``flex_attention`` for one. Public: none."""

OpOverloadPacket = _torch("torch._ops:OpOverloadPacket")
"""Class of ``torch.ops.aten.add``. Public: none."""

FakeTensor = _torch("torch._subclasses:FakeTensor")
"""Class of the tensors that stand in a graph's metadata. Public: none."""


assert_tensor_metadata = torch.ops.aten._assert_tensor_metadata.default
"""What torch.export writes before a cast: that the dtype is the one it saw. Public: none."""


def check() -> None:
    """Asks for everything in :data:`NAMES`.

    Raises:
        ImportError: Something is missing; one line names it.
    """
    for path in NAMES:
        _torch(path)


def schema_of(op: Any) -> torch.FunctionSchema:
    """Schema of an operator overload: names, types and aliasing of its arguments. Public: none."""
    return op._schema


def version_of(tensor: torch.Tensor) -> int:
    """How often PyTorch has counted a write into a tensor's storage. Public: none."""
    return tensor._version


def mark_static_address(tensor: torch.Tensor) -> None:
    """Promises Dynamo that a buffer stays where it is: no guard on it, and CUDA graphs may write into it.

    Public: none. Not allowed while tracing.
    """
    _torch("torch._dynamo:mark_static_address")(tensor)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Inductor's modes, each with the options that it stands for. Public: none."""
    return dict(_torch("torch._inductor:list_mode_options")())


def inductor_options() -> set[str]:
    """Names of Inductor's options. Public: none."""
    return set(_torch("torch._inductor.config:get_config_copy")())


def inductor_writes_cpp() -> bool:
    """Whether Inductor generates C++ for graphs on a CPU, as it does unless told otherwise. Public: none."""
    return bool(_torch("torch._inductor.config:cpu_backend") == "cpp")


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """What ``torch.compile(backend="inductor")`` does with a graph. Public: none that takes options for one call."""
    compiled: Callable[..., Any] = _torch("torch._inductor.compile_fx:compile_fx")(
        gm, list(example_inputs), config_patches=dict(patches)
    )
    return compiled


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would call, ``None`` where it finds none. Public: none."""
    try:
        return str(_torch("torch._inductor.cpp_builder:get_cpp_compiler")())
    except _torch("torch._inductor.exc:InvalidCxxCompiler"):
        return None


def functional_tensor_mode() -> type:
    """The dispatch mode under which AOTAutograd traces. Public: ``torch.library.triton_op`` alone knows it."""
    mode: type = _torch("torch._subclasses.functional_tensor:FunctionalTensorMode")
    return mode


def exports_keep_triton_ops() -> bool:
    """Whether a ``torch.export`` that keeps ops with Triton kernels as they are is running. Public: none."""
    return bool(_torch("torch.export._trace:custom_triton_ops_decomposition_disabled")())
