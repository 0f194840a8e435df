"""append_kv and dequantize_kv in Triton against the reference: the whole state, bit for bit.

On a GPU the kernels run there; elsewhere Triton's interpreter runs them on CPU tensors (see conftest.py).
"""

import itertools
import mmap
import os
import random
import sys

import pytest
import torch

from innerq_compile import ops
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import BLOCK, InnerQConfig
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS, LayerState, allocate_state

pytest.importorskip("triton")
from innerq_compile.kernels.triton.append_kv import append_kv  # noqa: E402
from innerq_compile.kernels.triton.dequantize_kv import dequantize_kv  # noqa: E402
from innerq_compile.kernels.triton.interpreter import repair  # noqa: E402
from innerq_compile.kernels.triton.launch import run  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
repair()

SMALL = {"sink": 5, "recent": 20}  # few tokens for the interpreter, and a sink that is no multiple of a block


class Twins:
    """One cache kept twice: by the reference on the CPU and by the kernels on the device."""

    def __init__(self, config, *, head_dim=32, heads=1, pads=(0,), dtype=torch.float32, capacity=512, seed=0):
        self.config, self.capacity = config, capacity
        self.shape = (len(pads), heads, head_dim)
        self.random = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.state = allocate_state(
            config, batch_size=len(pads), num_kv_heads=heads, head_dim=head_dim, capacity=capacity, dtype=dtype,
            device="cpu",
        )  # fmt: skip
        self.state.counts[:, PADS] = torch.tensor(pads)
        self.twin = LayerState(*(buffer.clone().to(DEVICE) for buffer in self.state))

    def new_tokens(self, count):
        """Channels of very different size, as keys have them."""
        batch, heads, head_dim = self.shape
        size = torch.logspace(-3, 1, head_dim)
        return [
            (torch.randn(batch, heads, count, head_dim, generator=self.random) * size).to(self.dtype) for _ in range(2)
        ]

    def append(self, count, tokens=None):
        key, value = tokens or self.new_tokens(count)
        reference.append_kv(key, value, self.state, self.config, self.capacity)
        append_kv(key.to(DEVICE), value.to(DEVICE), *self.twin, self.capacity, self.config.spec)

    def check_state(self):
        for name, expected, got in zip(LayerState._fields, self.state, self.twin, strict=True):
            got = got.cpu()
            if name in ("k_scales", "v_scales", "k_window", "v_window") and expected.dtype != torch.float64:
                kind = {2: torch.int16, 4: torch.int32}[expected.element_size()]
                expected, got = expected.view(kind), got.view(kind)  # also the sign of a zero, and NaN
            assert torch.equal(expected, got), f"{name} differs after {self.state.counts.tolist()}"

    def check_dequantized(self):
        expected = reference.dequantize_kv(self.state, self.config, self.capacity)
        got = dequantize_kv(*self.twin, self.capacity, self.config.spec)
        for name, x, y in zip(("keys", "values"), expected, got, strict=True):
            assert torch.equal(x.isnan(), y.cpu().isnan()), f"{name} are NaN elsewhere at {self.state.counts.tolist()}"
            assert torch.equal(x.nan_to_num(), y.cpu().nan_to_num()), f"{name} differ at {self.state.counts.tolist()}"


def boundaries(config):
    """Appends that stop at every length where something begins, the last two with one and with several flushes."""
    window = config.recent + config.flush_tokens
    return [*([config.sink - 1, 1] if config.sink > 1 else []), window - 1, 1, 1, config.flush_tokens, 2 * window + 3]


SETTINGS = [
    ({}, {}),
    (SMALL | {"key_bits": 2, "value_bits": 4, "key_mode": "asymmetric", "value_mode": "hybrid"}, {"heads": 2}),
    (SMALL | {"key_bits": 3, "value_bits": 2, "key_mode": "hybrid", "value_mode": "hybrid"}, {"dtype": torch.bfloat16}),
    (SMALL | {"key_bits": 4, "value_bits": 8, "value_mode": "asymmetric", "key_norm": "off"}, {"head_dim": 64}),
    (SMALL | {"key_bits": 8, "value_bits": 3, "key_mode": "hybrid", "key_norm": "folded"}, {"dtype": torch.float16}),
    (SMALL | {"levels": "paper", "key_bits": 3, "value_bits": 2, "value_mode": "hybrid"}, {"pads": (0, 7)}),
    (SMALL | {"levels": "paper", "key_bits": 2, "value_bits": 8, "key_mode": "asymmetric"}, {}),
    (SMALL | {"group_size": 16, "key_mode": "hybrid", "rope_pairs": "half", "key_norm_exponent": 1.0}, {}),
    (SMALL | {"group_size": 64, "value_mode": "hybrid", "rope_pairs": "adjacent"}, {"head_dim": 64}),
    (SMALL | {"group_size": 128, "value_bits": 2, "key_mode": "asymmetric"}, {"head_dim": 128}),
    (SMALL | {"flush": 64, "recent": 33, "sink": 0, "key_center": "runtime"}, {"head_dim": 96}),
    (SMALL | {"rope_pairs": "half"}, {"head_dim": 256, "dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("settings", "shape"), SETTINGS)
def test_every_boundary_length(settings, shape) -> None:
    config = InnerQConfig(**settings)
    twins = Twins(config, capacity=640 if config.group_size > 32 else 512, **shape)
    twins.check_dequantized()
    for count in boundaries(config):
        twins.append(count)
        twins.check_state()
    twins.check_dequantized()
    assert (twins.state.counts[:, QUANTIZED] > config.flush_tokens).all()


@pytest.mark.parametrize("length", [0, 3, 5, 56, 57, 150])
def test_first_prompt_of_padded_rows(length) -> None:
    config = InnerQConfig(**SMALL, key_mode="hybrid", rope_pairs="half")
    twins = Twins(config, heads=2, pads=(0, 2, 40), capacity=200)
    twins.append(length)
    twins.check_state()
    twins.append(1)
    twins.check_state()
    twins.check_dequantized()


def test_center_is_taken_from_a_long_prompt_only() -> None:
    config = InnerQConfig(**SMALL, key_center="runtime", rope_pairs="half")
    twins = Twins(config, pads=(0, 400), capacity=800)
    twins.append(600)
    twins.append(100)
    twins.check_state()
    assert twins.state.key_center[0].any() and not twins.state.key_center[1].any()


@pytest.mark.parametrize("seed", range(4))
def test_random_life(seed) -> None:
    """Appends of any size and crops from the end, in any order."""
    choose = random.Random(seed)
    settings = {
        "sink": choose.choice((0, 1, 32)), "recent": choose.choice((1, 31, 40)), "flush": choose.choice((32, 64)),
        "key_bits": choose.choice((2, 3)), "value_mode": choose.choice(("symmetric", "hybrid")),
        "rope_pairs": choose.choice(("off", "adjacent")),
    }  # fmt: skip
    twins = Twins(InnerQConfig(**settings), pads=(0, choose.randrange(9)), capacity=320, seed=seed)
    slots = 0
    for _ in range(14):
        if choose.random() < 0.2:
            count = choose.choice((1, 7, 50))
            for state in (twins.state, twins.twin):
                reference.crop_kv(state, twins.config, twins.capacity, count)
            slots = max(0, slots - count)
        else:
            count = min(choose.choice((1, 1, 2, 31, 32, 33, 64, 90)), twins.capacity - slots)
            twins.append(count)
            slots += count
        twins.check_state()
    twins.check_dequantized()


@pytest.mark.parametrize("prompt", [150, 57])
@pytest.mark.parametrize("settings", [{"key_mode": "hybrid", "value_mode": "asymmetric"}, {"group_size": 16}])
def test_numbers_that_are_not_finite_spoil_their_groups_and_nothing_else(prompt, settings) -> None:
    twins = Twins(InnerQConfig(**SMALL, **settings))
    key, value = twins.new_tokens(prompt)
    for tensor, (token, bad) in itertools.product((key, value), [(7, torch.nan), (30, torch.inf), (31, -torch.inf)]):
        tensor[0, 0, token, token % 5] = bad
    value[0, 0, 8:40, 3] = 1e30  # beyond the largest scale
    key[0, 0, :, 11] = 0.0
    twins.append(prompt, (key, value))
    twins.append(40)
    twins.check_state()
    twins.check_dequantized()
    assert twins.twin.k_scales.isnan().any() and not twins.twin.k_scales.isnan().all()
    assert twins.twin.key_norm.isfinite().all()


@pytest.mark.parametrize(("held", "too_many"), [(130, 1), (120, 20), (120, 100)])
def test_tokens_that_do_not_fit_are_counted_not_stored_and_every_read_is_nan(held, too_many) -> None:
    """One token, some, and a prompt: three ways through the kernels. Later appends and crops keep the mark."""
    config = InnerQConfig(**SMALL)
    twins = Twins(config, pads=(0, 3), capacity=130)
    twins.append(held)
    before = [buffer.clone() for buffer in twins.twin[:-1]]
    for count in (too_many, 1, 40):
        twins.append(count)
        twins.check_state()
        assert all(torch.equal(x, y) for x, y in zip(before, twins.twin, strict=False))
    reference.crop_kv(twins.twin, config, twins.capacity, 100)
    assert twins.twin.counts[:, SLOTS].tolist() == 2 * [held + too_many + 41]
    assert all(x.isnan().all() for x in reference.dequantize_kv(twins.state, config, 130))
    assert all(x.isnan().all() for x in dequantize_kv(*twins.twin, 130, config.spec))
    for state in (twins.state, twins.twin):
        state.counts[:, :PADS] = 0  # as reset() does, but for the pads
    twins.append(100)
    twins.check_state()
    twins.check_dequantized()


def test_a_row_that_has_lost_tokens_spoils_no_other() -> None:
    config = InnerQConfig(**SMALL)
    twins = Twins(config, pads=(0, 0, 0), heads=2, capacity=130)
    twins.append(130)
    for state in (twins.state, twins.twin):
        state.counts[1, SLOTS] = 131
    expected = reference.dequantize_kv(twins.state, config, 130)
    twins.check_dequantized()
    for x in expected:
        assert x.isnan().flatten(1).all(1).tolist() == x.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("count", [4, 60])
def test_strided_inputs(count) -> None:
    config = InnerQConfig(**SMALL)
    twins = Twins(config, heads=2, pads=(0, 0))
    key, value = twins.new_tokens(count)
    by_token = key.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection leaves them
    by_channel = value.transpose(2, 3).contiguous().transpose(2, 3)
    twins.append(count, (by_token, by_channel))
    twins.append(60)
    twins.check_state()


def test_wrong_shapes_are_refused() -> None:
    twins = Twins(InnerQConfig(**SMALL), heads=2)
    key, value = (x.to(DEVICE) for x in twins.new_tokens(3))
    for bad in ((key[:, :1], value[:, :1]), (key, value[:, :, :2]), (key[..., :16], value[..., :16])):
        with pytest.raises(ValueError, match=r"must both have shape \[1, 2, tokens, 32\]"):
            append_kv(*bad, *twins.twin, twins.capacity, twins.config.spec)
    twins.check_state()


def test_caches_the_kernels_do_not_serve_go_to_the_reference(monkeypatch) -> None:
    served = []
    for name in ("append_kv", "dequantize_kv"):
        monkeypatch.setitem(ops.DEFAULTS, name, lambda *args, name=name: served.append(name))
    twins = Twins(InnerQConfig(**SMALL), dtype=torch.float64)
    append_kv(*twins.new_tokens(1), *twins.twin, twins.capacity, twins.config.spec)
    dequantize_kv(*twins.twin, twins.capacity, twins.config.spec)
    assert served == ["append_kv", "dequantize_kv"]


def test_launches_depend_on_the_shape_alone() -> None:
    """What a CUDA graph recorded for one length is right for every other."""

    def launches(length):
        twins = Twins(InnerQConfig(**SMALL))
        if length:
            twins.append(length)
        calls = []

        def note(kernel, grid, *args, **options):
            fixed = [x if isinstance(x, int) else tuple(x.shape) for x in args]
            calls.append((kernel, grid, fixed, options))
            run(kernel, grid, *args, **options)

        key, value = (x.to(DEVICE) for x in twins.new_tokens(1))
        append_kv(key, value, *twins.twin, twins.capacity, twins.config.spec, launch=note)
        dequantize_kv(*twins.twin, twins.capacity, twins.config.spec, launch=note)
        return calls

    first = launches(0)
    assert len(first) == 2 and first == launches(56) == launches(130)


def sparse(shape, dtype):
    """Zeros that occupy memory only where they are written."""
    size = torch.Size(shape).numel() * dtype.itemsize
    no_reserve = 0x4000  # MAP_NORESERVE of Linux; Python knows the name from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).reshape(shape)


@pytest.mark.skipif("races" in os.environ.get("INNERQ_EMULATE", ""), reason="a record of every byte does not fit")
@pytest.mark.skipif(ON_GPU or sys.platform != "linux", reason="needs address space without memory behind it")
def test_offsets_beyond_32_bits() -> None:
    """The second head's codes and scales, and the inputs' tokens, start more than 2**31 elements into their buffer."""
    config = InnerQConfig(**SMALL, key_bits=2, value_bits=2, group_size=16, value_mode="asymmetric")
    twins = Twins(config, heads=2, capacity=256)
    blocks = 2**31 * config.group_size // 32 // BLOCK + 1
    small = twins.twin
    large = {}
    for name in ("k_codes", "k_scales", "v_codes", "v_scales", "v_zeros"):
        buffer = getattr(small, name)
        per_block = buffer.shape[2] // small.k_codes.shape[2]
        large[name] = sparse((1, 2, blocks * per_block, *buffer.shape[3:]), buffer.dtype)
        assert large[name].stride(1) > 2**31
    twins.twin = small._replace(**large)
    stride_h, stride_m = 2**32 + 64, 2**25  # the 65th token lies beyond 2**31
    far = sparse((stride_h + 150 * stride_m,), torch.float32).as_strided((1, 2, 150, 32), (0, stride_h, stride_m, 1))
    for count in (150, 20, 1, 30):
        key, value = twins.new_tokens(count)
        far[:, :, :count] = key
        twins.append(count, (far[:, :, :count], value))
    twins.check_dequantized()
    for name in large:
        expected = getattr(twins.state, name)
        assert torch.equal(expected, getattr(twins.twin, name)[:, :, : expected.shape[2]])
