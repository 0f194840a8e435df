import pytest

from innerq_compile.numerics.config import PRESETS, InnerQConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_spec_string_round_trips(preset):
    config = InnerQConfig.from_preset(preset)
    assert InnerQConfig.from_spec(config.spec) == config


@pytest.mark.parametrize(
    ("preset", "bits"), [("base", 3.5), ("small", 3.0), ("hybrid", 3.25), ("int4", 4.5), ("int8", 8.5)]
)
def test_bits_per_number_of_presets(preset, bits):
    assert InnerQConfig.from_preset(preset).bits_per_number == bits


@pytest.mark.parametrize(
    ("num_tokens", "quantized"),
    [(0, 0), (127, 0), (128, 0), (159, 0), (160, 32), (191, 32), (192, 64), (1000, 864), (1009, 864)],
)
def test_tokens_leave_in_blocks_and_the_recent_window_never_starves(num_tokens, quantized):
    config = InnerQConfig()
    assert config.num_quantized(num_tokens) == quantized
    if quantized:
        assert num_tokens - config.sink - quantized >= config.recent


@pytest.mark.parametrize("preset", PRESETS)
def test_our_presets_centre_and_the_published_ones_take_the_root_alone(preset):
    config = InnerQConfig.from_preset(preset)
    found = (config.key_norm_exponent, config.rope_pairs, config.key_center)
    assert found == ((0.5, "off", "off") if preset.startswith("paper-") else (1.0, "half", "runtime"))


def test_flush_defaults_to_whole_groups():
    assert InnerQConfig(group_size=128).flush == 128
    assert InnerQConfig(group_size=16).flush == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_bits": 5}, r"key_bits must be one of 2, 3, 4, 8, got 5"),
        ({"value_bits": True}, r"value_bits must be one of"),
        ({"value_mode": "sym"}, r"value_mode must be one of symmetric, asymmetric, hybrid, got 'sym'"),
        ({"levels": "half"}, r"levels must be one of full, paper"),
        ({"group_size": 24}, r"group_size must be one of 16, 32, 64, 128, got 24"),
        ({"sink": -1}, r"sink must be an integer of at least 0, got -1"),
        ({"recent": 0}, r"recent must be an integer of at least 1, got 0"),
        ({"recent": 96.0}, r"recent must be an integer"),
        ({"flush": 48}, r"flush must be a multiple of 32"),
        ({"flush": 32, "group_size": 64}, r"flush must be an integer of at least 64"),
        ({"key_norm": "none"}, r"key_norm must be one of runtime, folded, off"),
        ({"key_norm_exponent": 0.7}, r"key_norm_exponent must be one of 0.5, 1.0, got 0.7"),
        ({"rope_pairs": True}, r"rope_pairs must be one of half, adjacent, off"),
        ({"key_center": "mean"}, r"key_center must be one of runtime, off"),
        ({"k_bits": 3}, r"unknown InnerQ settings \['k_bits'\]; known settings: .*key_bits"),
    ],
)
def test_bad_settings_name_the_argument(settings, message):
    with pytest.raises(ValueError, match=message):
        InnerQConfig.from_options(settings)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="preset must be one of base, small, hybrid, .* got 'tiny'"):
        InnerQConfig.from_preset("tiny")
