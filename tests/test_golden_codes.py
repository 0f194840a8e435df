"""The bytes of every preset, as hashes: a change that is not meant to change a number is held to that here."""

import hashlib

import pytest
import torch

from innerq_compile import ops
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import PRESETS, InnerQConfig
from innerq_compile.numerics.layout import allocate_state

CHUNKS = (700, 1, 1, 33, 200, 1)
CAPACITY = 1024

HASHES: dict[str, str] = {
    "base": "8df304e608c5cfcc72914c3863b31236aa11e1f147c7a4bbe2033ca16cd085e2",
    "small": "57abd7034c2ca55b2790f4698780f1589e883a122f938a8c4621f3c8e26ab9c0",
    "hybrid": "0be35fc58f0547c5ebca85c61f2aa335f2dbf257ef7364cafdf8694b294c90f6",
    "int4": "cb95c229acbe468cf741597bc7de3738e92623c76bb377c832ae296a2061d634",
    "int8": "db484512d5d310c2d1b197cbc6271dd2444530a7d801160279ba32d71a66abd8",
    "paper-base": "c80d075737845cb52f449c690410a9b1e23d320bea553e5c3864fb914c89bbe2",
    "paper-small": "fdbca2505d874c9cfddf4c8b69dc4432a70878ec46fb2ba6bf3601557c9edd33",
    "paper-hybrid": "6004ee032143f73cf5f41fabd7504a988ec57ec3b01c00678627e4203c42cbbf",
}
"""Preset -> SHA-256 of a layer's buffers in the order of LayerState, after :data:`CHUNKS` of :func:`numbers`."""


def numbers(seed: int) -> torch.Tensor:
    """Keys or values [2, 2, tokens, 64] with outlying channels, from integers: the same with every version of torch."""
    shape = (2, 2, sum(CHUNKS), 64)
    state = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + seed
    for _ in range(3):
        state = (state * 1103515245 + 12345) % 2**31
        state ^= state >> 11
    uniform = ((state >> 7) % 2**16).float() / 2**15 - 1
    channel = 1 + (torch.arange(64) % 7 == 0) * 8.0
    return uniform.reshape(shape) ** 3 * channel + (torch.arange(64) % 5 == 0)


def digest(append, preset: str) -> str:
    config = InnerQConfig.from_preset(preset)
    state = allocate_state(
        config, batch_size=2, num_kv_heads=2, head_dim=64, capacity=CAPACITY, dtype=torch.float32, device="cpu"
    )
    keys, values, begin = numbers(0), numbers(1 << 20), 0
    for count in CHUNKS:
        chunk = slice(begin, begin + count)
        append(keys[:, :, chunk], values[:, :, chunk], state, config)
        begin += count
    found = hashlib.sha256()
    for buffer in state:
        found.update(buffer.contiguous().numpy().tobytes())
    return found.hexdigest()


def through_op(key, value, state, config):
    ops.append_kv(key, value, *state, CAPACITY, config.spec)


@pytest.mark.parametrize("append", [reference.append_kv, through_op])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_stores_the_bytes_it_always_stored(append, preset):
    assert digest(append, preset) == HASHES[preset]
