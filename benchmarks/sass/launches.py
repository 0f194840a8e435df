"""What is compiled: the launches that the launchers make of typical calls.

The launchers say it themselves: they run on CPU tensors with a recorder in place of a launch, so the signature, the
constants and the options are those of a real call.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from innerq_compile.kernels.triton import append_kv, decode_attention, dequantize_kv
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import LayerState, allocate_state

HEADS, CAPACITY = 8, 4096


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """One launch of a kernel: what it is called with, and what an iteration (without a loop, a program) moves.

    Attributes:
        codes: That it reads or writes; 0 where their number says nothing.
        read: Bytes of device memory that it needs, per code.
        written: Bytes that it stores there, per code.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    codes: int
    read: float
    written: float = 0.0

    @property
    def bytes_per_code(self) -> float:
        """Both ways."""
        return self.read + self.written


def recorded_launches(call: Any) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Kernels, arguments and options that a launcher would launch."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    call(lambda kernel, grid, *args, **options: launches.append((kernel, args, options)))
    return launches


def empty_cache(head_dim: int = 128, **settings: Any) -> tuple[InnerQConfig, LayerState]:
    """Settings of a preset and a cache of a bf16 model with them."""
    config = InnerQConfig.from_preset(**settings)
    shape = {"batch_size": 1, "num_kv_heads": HEADS, "head_dim": head_dim, "capacity": CAPACITY}
    return config, allocate_state(config, **shape, dtype=torch.bfloat16, device="cpu")


def attention(
    name: str, q_per_kv: int = 4, q_len: int = 1, head_dim: int = 128, **settings: Any
) -> list[Specialisation]:
    """decode_attention's two kernels for a bf16 model; settings of the cache, or ``mask=True`` or ``exact=True``."""
    mask, exact = settings.pop("mask", False), settings.pop("exact", False)
    config, state = empty_cache(head_dim, **settings)
    query = torch.empty(1, HEADS * q_per_kv, q_len, head_dim, dtype=torch.bfloat16)
    masked = torch.ones(1, 1, q_len, CAPACITY, dtype=torch.bool) if mask else None
    launches = recorded_launches(
        lambda launch: decode_attention.decode_attention(
            query, *state, masked, 0.1, CAPACITY, config.spec, exact, launch=launch
        )
    )
    found = []
    for (kernel, args, options), part in zip(launches, ("", " combine"), strict=True):
        codes = 2 * 32 * head_dim * options["NB"] if not part else 0
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        chosen = {key: arguments.pop(key) for key in ("num_warps", "num_stages") if key in arguments}
        if not part:
            arguments["WIDEN"] = False
        found.append(Specialisation(name + part, kernel, arguments, chosen, codes, config.bits_per_number / 8))
    return found


APPENDS = {
    "append_step_kernel": "append a token",
    "key_range_kernel": "prefill range",
    "key_norm_kernel": "prefill norm",
    "quantize_kernel": "prefill quantize",
    "window_kernel": "prefill window",
}


def appending(preset: str) -> list[Specialisation]:
    """append_kv's kernels, for a token and for a prefill."""
    config, state = empty_cache(preset=preset)
    found = []
    for num_new in (1, 1024):
        new = torch.empty(1, HEADS, num_new, 128, dtype=torch.bfloat16)
        call = functools.partial(append_kv.append_kv, new, new, *state, CAPACITY, config.spec)
        for kernel, args, options in recorded_launches(lambda launch, call=call: call(launch=launch)):
            codes = 2 * 32 * options["SLICE"] if kernel is append_kv.quantize_kernel else 0
            moved = {"codes": codes, "read": 2.0, "written": config.bits_per_number / 8}
            found.append(whole_program(f"{APPENDS[kernel.__name__]} {preset}", kernel, args, options, **moved))
    return found


def dequantizing(preset: str) -> Specialisation:
    """dequantize_kv's kernel."""
    config, state = empty_cache(preset=preset)
    ((kernel, args, options),) = recorded_launches(
        lambda launch: dequantize_kv.dequantize_kv(*state, CAPACITY, config.spec, launch=launch)
    )
    moved = {"codes": 2 * 32 * options["SLICE"], "read": config.bits_per_number / 8, "written": 2.0}
    return whole_program(f"dequantize {preset}", kernel, args, options, **moved)


def whole_program(
    name: str, kernel: Any, args: tuple[Any, ...], options: dict[str, Any], **moved: Any
) -> Specialisation:
    """A kernel that turns bf16 numbers into codes or codes into numbers, compiled as ``launch.run`` has it compiled."""
    arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    chosen = {"num_warps": arguments.pop("num_warps", 4), "enable_fp_fusion": False}
    return Specialisation(name, kernel, arguments, chosen, **moved)


def all_specialisations() -> list[Specialisation]:
    """Everything that the table shows."""
    base = attention("attention base", preset="base")
    return [
        *base,
        *(attention(f"attention {preset}", preset=preset)[0] for preset in ("small", "hybrid", "int4", "int8")),
        attention("attention base 1 head", q_per_kv=1, preset="base")[0],
        attention("attention base 16 heads", q_per_kv=16, preset="base")[0],
        attention("attention base D=64", head_dim=64, preset="base")[0],
        attention("attention base D=256", head_dim=256, preset="base")[0],
        attention("attention base mask", mask=True, preset="base")[0],
        attention("attention base exact", exact=True, preset="base")[0],
        *appending("base"),
        *(item for item in appending("hybrid") if item.codes or item.name.startswith("append")),
        *(dequantizing(preset) for preset in ("base", "hybrid")),
    ]


QUICK = ("attention base", "attention base combine", "attention small", "dequantize base") + tuple(
    f"{name} base" for name in APPENDS.values()
)
"""What is compiled where there is no time for all: the two presets that the goals are about, on every target."""
