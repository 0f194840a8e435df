"""Device functions that say which thread holds which number of a block, so that no number crosses to another thread.

A tensor ``[fields, places]`` has in its second axis what consecutive threads hold, 16 bytes of keys or two values each,
and in its first what one thread holds: all codes that share a byte with each other (:mod:`.tiles`). Triton lays out a
load or store of that shape just so, if the program has as many warps as :func:`warps_of` says; any other number is
right too, but slower. Loads and stores leave the layout, and what is reshaped or permuted between them keeps it.

Of the binary digits of a place in a tile (outer ``16 * half + row``, inner ``16 a + 8 b + 4 c + i``), a thread holds

=======  ================================  ==================================
         fields                            places
=======  ================================  ==================================
keys     half, a, b                        tile, row, c, i
values   half, a, b, i                     block, tile, c, row
=======  ================================  ==================================
"""

from __future__ import annotations

import triton
import triton.language as tl


def warps_of(slice_channels: int, blocks: int = 1) -> int:
    """Warps that give each thread 64 numbers of so many channels and blocks of 32 tokens."""
    return max(1, slice_channels // 64) * blocks


@triton.jit
def key_places(T: tl.constexpr):
    """Of keys [8, 128 * T]: token as two parts that add up, the second one equal for all threads, and channel."""
    field = tl.arange(0, 8)[:, None]
    place = tl.arange(0, 128 * T)[None, :]
    return place // 8 % 16, field // 4 * 16, place // 128 * 32 + place % 8 + field % 4 * 8


@triton.jit
def of_channels(x, T: tl.constexpr):
    """Numbers [32 * T] of the channels, to go with keys that are reshaped to [2, 4, T, 16, 8].

    Only in that shape does Triton make what depends on a channel once and spread it; it would otherwise make it anew in
    every thread, divisions included.
    """
    return tl.permute(tl.reshape(x, [1, T, 4, 8, 1]), [0, 2, 1, 4, 3])


@triton.jit
def keys_by_token(x, T: tl.constexpr):
    """Keys [2, 4, T, 16, 8] as [32 tokens, 32 * T channels]."""
    return tl.reshape(tl.permute(x, [0, 3, 2, 1, 4]), [32, 32 * T])


@triton.jit
def keys_by_place(x, T: tl.constexpr):
    """The inverse of :func:`keys_by_token`."""
    return tl.permute(tl.reshape(x, [2, 16, T, 4, 8]), [0, 3, 2, 1, 4])


@triton.jit
def value_places(P: tl.constexpr, T: tl.constexpr):
    """Of values [32, 32 * P * T]: token and channel, as :func:`key_places` says them."""
    field = tl.arange(0, 32)[:, None]
    place = tl.arange(0, 32 * P * T)[None, :]
    token = place // (32 * P) * 32 + place // 16 % 2 * 4
    # Written so that Triton sees two channels in a row, not 16: a thread's loads and stores are as wide as it sees.
    channel = place // 32 % P * 32 + place // 2 % 8 * 2 + place % 2 + field // 16 * 16
    return token, field // 4 % 4 * 8 + field % 4, channel


@triton.jit
def values_by_channel(x, P: tl.constexpr, T: tl.constexpr):
    """Values [32, 32 * P * T] as [32 * P channels, 32 * T tokens]."""
    x = tl.permute(tl.reshape(x, [2, 4, 4, T, P, 2, 16]), [4, 0, 6, 3, 1, 5, 2])
    return tl.reshape(x, [32 * P, 32 * T])


@triton.jit
def values_by_place(x, P: tl.constexpr, T: tl.constexpr):
    """The inverse of :func:`values_by_channel`."""
    x = tl.permute(tl.reshape(x, [P, 2, 16, T, 4, 2, 4]), [1, 4, 6, 3, 0, 5, 2])
    return tl.reshape(x, [32, 32 * P * T])
