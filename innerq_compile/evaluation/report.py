"""One run of ``innerq eval``: a model, a text, some presets, and a table of what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

from innerq_compile.cache.innerq_cache import InnerQCache
from innerq_compile.evaluation.quality import measure
from innerq_compile.evaluation.smollm2 import smollm2
from innerq_compile.evaluation.texts import read_text

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and of what.

    Attributes:
        text_hash: First digits of the SHA-256 of the whole text.
        tokens, prompt_tokens: Tokens read, and those of the first call, which are not scored.
        rows: Preset -> its :meth:`~innerq_compile.evaluation.quality.Quality.summary`, bits per number and bytes.
    """

    model: str
    text: str
    text_hash: str
    tokens: int
    prompt_tokens: int
    rows: dict[str, dict[str, float]]

    HEADERS = ("preset", "bits", "MB", "KL", "KL, last 256", "perplexity", "agreement")

    def __str__(self) -> str:
        """A table below one line on how it came about."""
        cells = [
            (
                name,
                f"{row['bits']:.2f}",
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['kl']:.4f} ± {row['kl_error']:.4f}",
                f"{row['kl_last']:.4f}",
                f"{100 * row['perplexity_change']:+.1f} ± {100 * row['perplexity_error']:.1f} %",
                f"{100 * row['agreement']:.1f} ± {100 * row['agreement_error']:.1f} %",
            )
            for name, row in self.rows.items()
        ]
        head = (
            f"{self.model}, text {self.text} ({self.text_hash}), {self.tokens} tokens, the first {self.prompt_tokens} "
            "read in one call and not scored; against full precision, KL in nats, ± one standard error\n"
        )
        return head + tabulate(cells, headers=self.HEADERS, tablefmt="github", disable_numparse=True)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def evaluate_presets(
    model: str, presets: list[str], text: str, tokens: int, prompt_tokens: int, *, progress: bool = True
) -> Evaluation:
    """Reads ``tokens`` tokens of a text with a float32 model and one cache per preset.

    Raises:
        ValueError: An unknown preset or text, a text or a model that is too short, or a model that cannot be had.
    """
    content, text_hash = read_text(text)
    folder = str(smollm2()) if model == SMOLLM2 else model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest = getattr(network.config.get_text_config(decoder=True), "max_position_embeddings", tokens)
    ids = torch.tensor([tokenizer.encode(content, add_special_tokens=False, verbose=False)[:tokens]])
    if ids.shape[1] < tokens or tokens > longest:
        raise ValueError(
            f"{tokens} tokens were asked for, the text has {ids.shape[1]} and the model positions for {longest}"
        )
    caches = {name: InnerQCache(network.config, preset=name, max_cache_len=tokens) for name in presets}
    found = measure(network, ids, caches, prompt=prompt_tokens, progress=progress)
    rows = {
        name: {
            **quality.summary(),
            "bits": caches[name].config.bits_per_number,
            "bytes": float(caches[name].memory_bytes),
        }
        for name, quality in found.items()
    }
    return Evaluation(model, text, text_hash, tokens, prompt_tokens, rows)
