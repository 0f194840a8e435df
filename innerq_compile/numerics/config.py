"""Settings of the quantized cache: one frozen object, checked once, with the presets that have names.

Every ``ValueError`` about settings is raised here; the rest of the package trusts an :class:`InnerQConfig`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

BITS = (2, 3, 4, 8)
MODES = ("symmetric", "asymmetric", "hybrid")
LEVELS = ("full", "paper")
GROUP_SIZES = (16, 32, 64, 128)
KEY_NORMS = ("runtime", "folded", "off")
KEY_NORM_EXPONENTS = (0.5, 1.0)
KEY_CENTERS = ("runtime", "off")
ROPE_PAIRS = ("half", "adjacent", "off")

BLOCK = 32
"""Tokens per storage block. The packed layout is made of 32 x 32 tiles, so tokens are quantized 32 at a time."""

MAX_FUSED_Q_LEN = 32
"""Longest run of query tokens that the fused decode attention serves; a longer chunk attends through SDPA."""


@dataclasses.dataclass(frozen=True)
class TensorQuantSpec:
    """How one tensor (the keys, or the values) is quantized. The same code serves both.

    Formula (docs/design.md section 3): ``x = s * (u - c0) + z`` with the unsigned code ``u``.
    """

    bits: int
    mode: str
    levels: str
    group_size: int

    @property
    def symmetric_center(self) -> float:
        """``c0`` of the symmetric arm: mid-rise for ``full`` levels, mid-tread (sign-magnitude) for ``paper``."""
        return (2**self.bits - 1) / 2 if self.levels == "full" else float(2 ** (self.bits - 1) - 1)

    @property
    def symmetric_span(self) -> float:
        """``max|x| / s`` of the symmetric arm. ``full`` puts the largest number on the outer *edge* of the outer level
        (``2**(bits-1)``), not on the level itself: 17 % less squared error at 3 bits on N(0,1), 39 % less at 2 bits.
        """
        return float(2 ** (self.bits - 1)) if self.levels == "full" else self.symmetric_center

    @property
    def symmetric_max_code(self) -> int:
        """Largest code of the symmetric arm; ``paper`` leaves the top code unused (it would be a second zero)."""
        return 2**self.bits - 1 if self.levels == "full" else 2**self.bits - 2

    @property
    def asymmetric_max_code(self) -> int:
        """Largest code of the asymmetric arm; the published hybrid gives that arm one bit less."""
        bits = self.bits - 1 if self.mode == "hybrid" and self.levels == "paper" else self.bits
        return 2**bits - 1

    @property
    def stores_zeros(self) -> bool:
        """Whether a float offset per group is stored beside the scale."""
        return self.mode != "symmetric"

    @property
    def bits_per_number(self) -> float:
        """Stored bits per number, scales and zeros included, windows not."""
        return self.bits + (32 if self.stores_zeros else 16) / self.group_size


@dataclasses.dataclass(frozen=True)
class InnerQConfig:
    """Settings of an InnerQ cache.

    Args:
        key_bits, value_bits: Bits per code, sign included: 2, 3, 4 or 8.
        key_mode, value_mode: ``"symmetric"``, ``"asymmetric"`` or ``"hybrid"`` (the better of both, per group).
        levels: ``"full"`` uses all ``2**bits`` levels, ``"paper"`` reproduces the published quantizers.
        group_size: Numbers that share a scale: consecutive channels for keys, consecutive tokens for values.
        sink: First tokens, kept in the model's own dtype for ever.
        recent: At least this many last tokens are kept in the model's own dtype.
        flush: Tokens leave the recent window in blocks of this many; a multiple of 32 and of ``group_size``.
            ``None`` picks the smallest such number.
        key_norm: ``"runtime"`` divides keys by a per-channel norm and multiplies the query by it, ``"folded"``
            says that the norm already sits in the projection weights, ``"off"`` does without.
        key_norm_exponent: What a run-time norm makes of the largest magnitude of a channel: 0.5 takes the root, as
            published, 1.0 the magnitude itself.
        rope_pairs: Which channels of a head share a run-time norm, because RoPE turns one into the other as the
            sequence goes on: ``"half"`` d and d + head_dim / 2, ``"adjacent"`` 2d and 2d + 1, ``"off"`` none.
        key_center: ``"runtime"`` subtracts a constant per channel before keys are normalized and quantized (a
            constant cancels in the softmax) when the first quantized prompt is long enough to tell, ``"off"`` does
            without. Combines with every ``key_norm``. All three:
            :func:`innerq_compile.numerics.quant.key_center_and_norm`.

    Raises:
        ValueError: For every setting out of range; the message names the argument.
    """

    key_bits: int = 3
    value_bits: int = 3
    key_mode: str = "symmetric"
    value_mode: str = "symmetric"
    levels: str = "full"
    group_size: int = 32
    sink: int = 32
    recent: int = 96
    flush: int | None = None
    key_norm: str = "runtime"
    key_norm_exponent: float = 1.0
    rope_pairs: str = "half"
    key_center: str = "runtime"
    _spec: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            _check_choice(name, getattr(self, name), BITS)
        for name in ("key_mode", "value_mode"):
            _check_choice(name, getattr(self, name), MODES)
        _check_choice("levels", self.levels, LEVELS)
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        _check_choice("key_norm", self.key_norm, KEY_NORMS)
        _check_choice("key_norm_exponent", self.key_norm_exponent, KEY_NORM_EXPONENTS)
        object.__setattr__(self, "key_norm_exponent", float(self.key_norm_exponent))
        _check_choice("rope_pairs", self.rope_pairs, ROPE_PAIRS)
        _check_choice("key_center", self.key_center, KEY_CENTERS)
        _check_int("sink", self.sink, minimum=0)
        _check_int("recent", self.recent, minimum=1)
        unit = max(BLOCK, self.group_size)
        if self.flush is None:
            object.__setattr__(self, "flush", unit)
        _check_int("flush", self.flush, minimum=unit)
        if self.flush_tokens % unit:
            raise ValueError(
                f"flush must be a multiple of {unit} (blocks of {BLOCK} tokens, group_size {self.group_size}), "
                f"got {self.flush}"
            )

        # Written once: Dynamo would take a float among the settings for a symbol and refuse to print it.
        spec = ";".join(f"{name}={value}" for name, value in self.options.items())
        object.__setattr__(self, "_spec", spec)

    @property
    def flush_tokens(self) -> int:
        """``flush`` as a plain int (it is never ``None`` once the object exists)."""
        assert self.flush is not None
        return self.flush

    @property
    def ring(self) -> int:
        """Slots of the ring that holds the recent window: ``recent + flush``."""
        return self.recent + self.flush_tokens

    @property
    def max_fused_q_len(self) -> int:
        """Longest chunk whose own tokens can never be flushed by its own append, so that it attends to exact keys."""
        return min(MAX_FUSED_Q_LEN, self.recent)

    @property
    def key_spec(self) -> TensorQuantSpec:
        """Quantization of the keys (groups along channels)."""
        return TensorQuantSpec(self.key_bits, self.key_mode, self.levels, self.group_size)

    @property
    def value_spec(self) -> TensorQuantSpec:
        """Quantization of the values (groups along tokens)."""
        return TensorQuantSpec(self.value_bits, self.value_mode, self.levels, self.group_size)

    @property
    def bits_per_number(self) -> float:
        """Stored bits per number of the quantized part, averaged over keys and values."""
        return (self.key_spec.bits_per_number + self.value_spec.bits_per_number) / 2

    def num_quantized(self, num_tokens: int) -> int:
        """Tokens of a history of ``num_tokens`` that have left the windows (no crop in between)."""
        flush = self.flush_tokens
        return max(0, (num_tokens - self.sink - self.recent) // flush) * flush

    @property
    def options(self) -> dict[str, Any]:
        """The settings by name; :meth:`from_options` reads them back."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    @property
    def spec(self) -> str:
        """The settings as the string that the ops carry in a graph; :meth:`from_spec` reads it back."""
        return self._spec

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_spec(spec: str) -> InnerQConfig:
        """Reads :attr:`spec` back. Cached: the ops call it on every step."""
        options: dict[str, Any] = dict(item.split("=", 1) for item in spec.split(";"))
        for name, value in options.items():
            kind = type(getattr(InnerQConfig, name, ""))
            options[name] = value if kind is str else int(value) if value.isdigit() else float(value)
        return InnerQConfig.from_options(options)

    @staticmethod
    def from_preset(preset: str = "base", **overrides: Any) -> InnerQConfig:
        """A named preset, with single settings replaced.

        Raises:
            ValueError: Unknown preset, unknown setting, or a setting out of range.
        """
        _check_choice("preset", preset, tuple(PRESETS))
        return InnerQConfig.from_options({**PRESETS[preset], **overrides})

    @staticmethod
    def from_options(options: Mapping[str, Any]) -> InnerQConfig:
        """Builds a config from plain settings, refusing names that do not exist.

        Raises:
            ValueError: An unknown name (the message lists the known ones) or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(InnerQConfig) if field.init}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"unknown InnerQ settings {unknown}; known settings: {sorted(known)}")
        return InnerQConfig(**options)


_HYBRID = {"key_bits": 3, "value_bits": 2, "value_mode": "hybrid"}
_PAPER = {"levels": "paper", "key_norm_exponent": 0.5, "rope_pairs": "off", "key_center": "off"}
PRESETS: dict[str, dict[str, Any]] = {
    "base": {"key_bits": 3, "value_bits": 3},
    "small": {"key_bits": 3, "value_bits": 2},
    "hybrid": _HYBRID,
    "int4": {"key_bits": 4, "value_bits": 4},
    "int8": {"key_bits": 8, "value_bits": 8},
    "paper-base": {"key_bits": 3, "value_bits": 3, **_PAPER},
    "paper-small": {"key_bits": 3, "value_bits": 2, **_PAPER},
    "paper-hybrid": {**_HYBRID, **_PAPER},
}
"""Preset name -> settings that differ from the defaults of :class:`InnerQConfig` (docs/design.md section 8)."""


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices or isinstance(value, bool) or (isinstance(value, float) and isinstance(choices[0], int)):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _check_int(name: str, value: Any, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
