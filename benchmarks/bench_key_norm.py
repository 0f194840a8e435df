"""Which key norm is best: 3-bit KL of the reference model, and of copies with outlier key channels, for every factor.

A prompt is read in full precision and handed to a cache; then a chunk of the following tokens attends to the quantized
past and to itself. KL is that of the chunk's next-token distributions against the full-precision cache, in nats.
Calibration and measurement use different parts of the held-out text.

    python benchmarks/bench_key_norm.py                       # both studies, about ten minutes
    python benchmarks/bench_key_norm.py --prompts 2 --seeds 1 # a quick look
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from innerq_compile import InnerQCache, fold, fold_key_norm
from innerq_compile.config import InnerQConfig
from innerq_compile.demo.evaluate import Decoded, Prefill, agreement, kl_divergence, prefill
from innerq_compile.layer import InnerQLayer
from innerq_compile.quant import KEY_NORM_EPS

CALIBRATION_TOKENS = 4096
OUTLIER_SHARE = 1 / 8
"""Of the RoPE pairs of each KV head that a stress model scales up."""


@dataclass(frozen=True)
class Variant:
    """A way to normalize keys: where, with which factor, and whether around the mean of each channel."""

    name: str
    key_norm: str = "off"
    statistic: str = "max"
    strength: float = 0.5
    center: bool = False
    fold: dict[str, Any] = field(default_factory=dict)


def runtime(name: str, **settings: Any) -> Variant:
    """A factor taken from the prompt, divided and multiplied in every step."""
    return Variant(f"run time, {name}", key_norm="runtime", **settings)


def folded(name: str, center: bool = False, **settings: Any) -> Variant:
    """A factor taken from calibration text, folded into the weights."""
    fold = {"statistic": "max", "strength": 0.5, "query_strength": 0.0, **settings}
    return Variant(f"folded, {name}", key_norm="folded", center=center, fold=fold)


RMS = {"statistic": "rms"}
BOTH = {"strength": 0.5, "query_strength": 0.5}
VARIANTS = [
    Variant("off"),
    Variant("off, centred", center=True),
    runtime("max^0.25", strength=0.25),
    runtime("max^0.5 (paper)"),
    runtime("max^0.5, centred", center=True),
    runtime("max^1", strength=1.0),
    runtime("max^1, centred", strength=1.0, center=True),
    runtime("rms^0.25", **RMS, strength=0.25),
    runtime("rms^0.5", **RMS),
    runtime("rms^1", **RMS, strength=1.0),
    folded("max^0.25", strength=0.25),
    folded("max^0.5 (paper)"),
    folded("max^0.5, off below 1.5", off_below=1.5),
    folded("max^0.5, power of two", power_of_two=True),
    folded("max^0.5, centred", center=True),
    folded("max^1", strength=1.0),
    folded("max^1, power of two", strength=1.0, power_of_two=True),
    folded("max^1, centred", strength=1.0, center=True),
    folded("rms^0.25", **RMS, strength=0.25),
    folded("rms^0.5", **RMS),
    folded("rms^1", **RMS, strength=1.0),
    folded("max K^0.8 / Q^0.2", strength=0.8, query_strength=0.2),
    folded("max K^0.65 / Q^0.35", strength=0.65, query_strength=0.35),
    folded("max K^0.5 / Q^0.5", **BOTH),
    folded("max K^0.5 / Q^0.5, centred", **BOTH, center=True),
    folded("rms K^0.65 / Q^0.35", **RMS, strength=0.65, query_strength=0.35),
    folded("rms K^0.5 / Q^0.5", **RMS, **BOTH),
]


class NormedLayer(InnerQLayer):
    """Stores ``(keys - center) / norm``, both fixed by the prompt, and gives the keys back: any run-time norm.

    What is quantized is what the cache's own run-time norm would quantize; only here the factor is free to choose.
    """

    def __init__(self, variant: Variant, config: InnerQConfig, max_cache_len: int | None) -> None:
        super().__init__(config, max_cache_len)
        self.variant = variant

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if self.is_empty:
            self._fix(key[:, :, self.config.sink : key.shape[2] - self.config.recent])
        super()._append((key - self.center) / self.norm, value)

    def _fix(self, keys: torch.Tensor) -> None:
        self.center = keys.mean(2, keepdim=True) * self.variant.center
        found = (keys - self.center).abs()
        found = found.amax(2, keepdim=True) if self.variant.statistic == "max" else found.square().mean(2, True).sqrt()
        strength = self.variant.strength if self.variant.key_norm == "runtime" else 0.0
        self.norm = (found**strength).clamp(min=KEY_NORM_EPS)

    def _dequantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super()._dequantize()
        return keys * self.norm + self.center, values


def with_outliers(model: PreTrainedModel, seed: int, low: float = 4.0, high: float = 64.0) -> PreTrainedModel:
    """A copy of the same function, some key channels ``low`` to ``high`` times as large, their queries as small."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    heads, q_per_kv = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    half = config.head_dim // 2
    damaged = copy.deepcopy(model)
    for layer in damaged.model.layers:
        chosen = torch.rand(heads, half, generator=generator) < OUTLIER_SHARE
        exponent = torch.rand(heads, half, generator=generator) * (math.log(high) - math.log(low)) + math.log(low)
        scale = torch.where(chosen, exponent.exp(), 1.0).repeat(1, 2)  # the two channels of a RoPE pair alike
        layer.self_attn.k_proj.weight.data *= scale.reshape(-1, 1)
        layer.self_attn.q_proj.weight.data /= scale.repeat_interleave(q_per_kv, 0).reshape(-1, 1)
    return damaged


@dataclass
class Text:
    """Prompts with the chunks that follow them, and tokens to calibrate with."""

    calibration: torch.Tensor
    prompts: list[torch.Tensor]
    chunks: list[torch.Tensor]


def read_text(path: Path, args: argparse.Namespace) -> Text:
    """Splits the held-out text: calibration first, prompts spread evenly over the rest."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = (path / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    rest, length = ids[CALIBRATION_TOKENS:], args.context + args.chunk
    begins = [i * ((len(rest) - length) // max(args.prompts - 1, 1)) for i in range(args.prompts)]
    windows = [rest[begin : begin + length][None] for begin in begins]
    return Text(
        ids[:CALIBRATION_TOKENS], [w[:, : args.context] for w in windows], [w[:, args.context :] for w in windows]
    )


@torch.no_grad()
def chunk_logits(model: PreTrainedModel, prompt: Prefill, chunk: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits float32 [chunk, vocabulary] behind a prompt that was handed to ``cache``."""
    prompt.load_into(cache)
    positions = torch.arange(prompt.num_tokens, prompt.num_tokens + chunk.shape[1])[None]
    return model(input_ids=chunk, past_key_values=cache, position_ids=positions, use_cache=True).logits[0].float()


@dataclass(frozen=True)
class Score:
    """KL in nats and share of equal top tokens, over all chunks."""

    kl: float
    agreement: float


class Study:
    """One model with its prompts read once."""

    def __init__(self, model: PreTrainedModel, text: Text) -> None:
        self.model, self.text = model, text
        self.prefills = [prefill(model, prompt) for prompt in text.prompts]
        self.captured = fold._capture(model, text.calibration)  # one capture serves all factors of a model

    def logits(self, make_cache: Callable[[], Cache], prefills: list[Prefill] | None = None) -> torch.Tensor:
        """Of all chunks, each behind a fresh cache that was handed its prompt: float32 [positions, vocabulary]."""
        pairs = zip(prefills or self.prefills, self.text.chunks, strict=True)
        return torch.cat([chunk_logits(self.model, prompt, chunk, make_cache()) for prompt, chunk in pairs])

    @contextlib.contextmanager
    def folded(self, variant: Variant) -> Iterator[list[Prefill]]:
        """Folds the model for a while; the prompts' keys follow without reading them again."""
        with unittest.mock.patch.object(fold, "_capture", lambda *_: self.captured):
            handle = fold_key_norm(self.model, self.text.calibration, progress=False, **variant.fold)
        factors = [f.float()[None, :, None] for f in handle.factors.values()]
        try:
            yield [
                Prefill(p.num_tokens, [(k / f, v) for (k, v), f in zip(p.keys_values, factors, strict=True)])
                for p in self.prefills
            ]
        finally:
            handle.restore()

    def scores(self, variant: Variant, bits: list[int], full: Decoded) -> dict[int, Score]:
        """By key bits. The values stay at 8 bits, so that only the error of the keys shows."""
        folding = self.folded(variant) if variant.key_norm == "folded" else contextlib.nullcontext(self.prefills)
        found = {}
        with folding as prefills:
            for key_bits in bits:
                decoded = Decoded(self.logits(lambda b=key_bits: self._cache(variant, b), prefills), [])
                found[key_bits] = Score(kl_divergence(decoded, full), agreement(decoded, full))
        return found

    def _cache(self, variant: Variant, key_bits: int) -> Cache:
        capacity = self.text.prompts[0].shape[1] + self.text.chunks[0].shape[1]
        cache = InnerQCache(self.model.config, "int8", capacity, key_bits=key_bits, key_norm="off")
        cache.layers = [NormedLayer(variant, layer.config, layer.max_cache_len) for layer in cache.layers]
        return cache


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both studies as plain data."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = read_text(args.model, args)
    plain = Study(model, text)
    full = Decoded(plain.logits(lambda: DynamicCache(config=model.config)), [])
    undamaged = {v.name: plain.scores(v, args.bits, full) for v in tqdm(VARIANTS, desc="undamaged")}
    stressed, drifts = [], []
    for seed in range(args.seeds):
        study = Study(with_outliers(model, seed), text)
        own = study.logits(lambda: DynamicCache(config=model.config))
        drifts.append(float((own - full.logits).abs().max() / full.logits.abs().max()))
        stressed.append({v.name: study.scores(v, args.bits, full) for v in tqdm(VARIANTS, desc=f"outliers {seed}")})
    rows = {
        variant.name: {
            str(b): {
                "kl": undamaged[variant.name][b].kl,
                "agreement": undamaged[variant.name][b].agreement,
                "stress_kl": sum(s[variant.name][b].kl for s in stressed) / len(stressed),
                "stress_kl_each": [s[variant.name][b].kl for s in stressed],
            }
            for b in args.bits
        }
        for variant in VARIANTS
    }
    return {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "torch": torch.__version__,
        "positions": len(text.chunks) * args.chunk,
        "full_precision_drift_of_stress_models": drifts,
        "variants": [asdict(variant) for variant in VARIANTS],
        "scores": rows,
    }


def table(result: dict[str, Any]) -> str:
    """KL by factor, undamaged and averaged over the stress models."""
    bits = [str(b) for b in result["settings"]["bits"]]
    headers = ["key norm", *(f"KL, K {b} bits" for b in bits), *(f"outliers, K {b} bits" for b in bits)]
    rows = [
        (name, *(f"{row[b]['kl']:.5f}" for b in bits), *(f"{row[b]['stress_kl']:.5f}" for b in bits))
        for name, row in result["scores"].items()
    ]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("innerq_compile/demo/model"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/key_norm.json"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seeds", type=int, default=2, help="stress models")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(table(result))
    print(f"full-precision drift of the stress models: {max(result['full_precision_drift_of_stress_models']):.1e}")


if __name__ == "__main__":
    main()
