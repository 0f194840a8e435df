"""Random keys or values in each layout of the experiment, and what they decode to.

Keys and values differ only in which axis of a tile is which: a key tile is [token, channel], a value tile
[channel, token]; the second axis is the one that a product sums over.
"""

from __future__ import annotations

import dataclasses

import torch

from innerq_compile.config import BLOCK
from innerq_compile.quant import unpack_tiles

INNER, HYBRID, OUTER = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one of the two tensors is stored.

    Attributes:
        kind: INNER (symmetric), HYBRID or OUTER (asymmetric), as the kernels number them.
        asymmetric: Share of a hybrid tensor's groups that are asymmetric.
    """

    bits: int
    kind: int
    asymmetric: float = 0.0

    @property
    def center(self) -> float:
        """``c0`` of the symmetric formula."""
        return (2**self.bits - 1) / 2


LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "KIVI 2/2": (Layout(2, OUTER), Layout(2, OUTER)),
    "InnerQ base": (Layout(3, INNER), Layout(3, INNER)),
    "InnerQ small": (Layout(3, INNER), Layout(2, INNER)),
    "InnerQ hybrid 1%": (Layout(3, INNER), Layout(2, HYBRID, 0.01)),
    "InnerQ hybrid 50%": (Layout(3, INNER), Layout(2, HYBRID, 0.5)),
}
"""Name -> layout of the keys, of the values."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """Tiles: codes uint8 [heads, blocks, D / 32, bytes], scales and zeros float16 [heads, blocks, D / 32, 32]."""

    layout: Layout
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def clone(self) -> Packed:
        """The same in memory of its own."""
        return Packed(self.layout, self.codes.clone(), self.scales.clone(), self.zeros.clone())

    @property
    def bytes(self) -> int:
        """Stored bytes; a hybrid tensor's zeros count where they are read, beside an asymmetric scale."""
        zeros = {INNER: 0.0, HYBRID: self.layout.asymmetric, OUTER: 1.0}[self.layout.kind]
        return int(self.codes.numel() + 2 * self.scales.numel() * (1 + zeros))


def random_packed(layout: Layout, heads: int, tokens: int, head_dim: int, device: torch.device) -> Packed:
    """Any codes, scales of a plausible size."""
    lead = (heads, tokens // BLOCK, head_dim // BLOCK)
    codes = torch.randint(0, 256, (*lead, 128 * layout.bits), dtype=torch.uint8, device=device)
    scales = (torch.rand(*lead, BLOCK, device=device) * 0.5 + 0.1).half()
    zeros = torch.randn(*lead, BLOCK, device=device).half()
    if layout.kind == HYBRID:
        chosen = torch.rand(*lead, BLOCK, device=device) < layout.asymmetric
        scales, zeros = torch.where(chosen, -scales, scales), torch.where(chosen, zeros, 0.0)
    if layout.kind == INNER:
        zeros = zeros[:0]
    return Packed(layout, codes, scales, zeros)


def decoded(packed: Packed) -> torch.Tensor:
    """float64 [heads, blocks, D / 32, 32 outer, 32 inner]."""
    codes = unpack_tiles(packed.codes, packed.layout.bits).double()
    scales, zeros = packed.scales.double(), packed.zeros.double()
    if packed.layout.kind == OUTER:
        return codes * scales.unsqueeze(3) + zeros.unsqueeze(3)
    center = torch.full_like(scales, packed.layout.center)
    if packed.layout.kind == INNER:
        return scales.unsqueeze(4) * (codes - center.unsqueeze(4))
    center = torch.where(torch.signbit(scales), 0.0, center)
    return scales.abs().unsqueeze(4) * (codes - center.unsqueeze(4)) + zeros.unsqueeze(4)


def product(x: torch.Tensor, tiles: torch.Tensor, *, keys: bool) -> torch.Tensor:
    """The product in float64: x [heads, M, D] to [heads, M, tokens] for keys, the other way round for values."""
    if keys:
        x = x.double().unflatten(2, (-1, BLOCK))
        return torch.einsum("hmdi,hbdoi->hmbo", x, tiles).flatten(2)
    x = x.double().unflatten(2, (-1, BLOCK))
    return torch.einsum("hmbi,hbdoi->hmdo", x, tiles).flatten(2)


def rounding_cost(x: torch.Tensor, packed: Packed, *, keys: bool) -> torch.Tensor:
    """The product when vectors are rounded to 8 bits per group, where the layout has them rounded."""
    tiles = decoded(packed)
    if packed.layout.kind != OUTER:
        return product(_rounded(x.double()), tiles, keys=keys)
    # Each tile rounds the vector times its own scales; zeros stay exact.
    codes = unpack_tiles(packed.codes, packed.layout.bits).double()
    x = x.double().unflatten(2, (-1, BLOCK))
    x = x[:, :, None] if keys else x[:, :, :, None]  # [heads, M, blocks or 1, D / 32 or 1, 32]
    rounded = _rounded(x * packed.scales.double()[:, None])
    from_zeros = (x * packed.zeros.double()[:, None]).sum(-1, keepdim=True)
    y = torch.einsum("hmbdi,hbdoi->hmbdo", rounded, codes) + from_zeros
    return (y.sum(3) if keys else y.sum(2)).flatten(2)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    groups = x.unflatten(-1, (-1, BLOCK))
    step = groups.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (groups / step).round() * step, 0.0).flatten(-2)
