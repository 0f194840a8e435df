"""Which channels share a norm, asked of configurations and of the code of the models themselves."""

import pytest
import transformers

from innerq_compile import InnerQCache
from innerq_compile.cache.rope import rope_pairs_of


@pytest.mark.parametrize(
    ("name", "arguments", "pairs"),
    [
        ("LlamaConfig", {}, "half"),
        ("Qwen3Config", {}, "half"),
        ("Gemma3TextConfig", {}, "half"),
        ("GptOssConfig", {}, "half"),
        ("Phi3Config", {}, "half"),
        ("Phi3Config", {"partial_rotary_factor": 0.5}, "off"),
        ("GPTNeoXConfig", {}, "off"),
        ("CohereConfig", {}, "adjacent"),
        ("GlmConfig", {"partial_rotary_factor": 1.0}, "adjacent"),
        ("GlmConfig", {}, "off"),
        ("GPTJConfig", {}, "off"),
        ("GPTJConfig", {"rotary_dim": 256}, "adjacent"),
        ("GPT2Config", {}, "off"),
        ("OPTConfig", {}, "off"),
    ],
)
def test_pairs_of_a_model(name, arguments, pairs):
    assert rope_pairs_of(getattr(transformers, name)(**arguments)) == pairs


def test_a_configuration_without_code_of_its_own_counts_as_half():
    class Unknown(transformers.LlamaConfig):
        pass

    assert rope_pairs_of(Unknown()) == "half"


def test_a_cache_follows_the_model_unless_told(tiny_config):
    assert InnerQCache(tiny_config, rope_pairs="adjacent").config.rope_pairs == "adjacent"
    assert InnerQCache(tiny_config, rope_pairs="off").config.rope_pairs == "off"
    assert InnerQCache(tiny_config, "paper-base").config.rope_pairs == "off"
