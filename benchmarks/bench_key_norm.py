"""Which key norm and which center are best: KL of the reference model, and of copies with outlier key channels.

A prompt is read in full precision and handed to a cache; then a chunk of the following tokens attends to the quantized
past and to itself. KL is that of the chunk's next-token distributions against the full-precision cache, as mean and
standard error over prompts (over copies for the copies). Values are kept at 8 bits, so that only the error of the keys
shows. Calibration and measurement use different parts of the held-out text.

Four questions, four parts of the result:
  as trained      every norm and center, prompts handed over at once
  outliers        the same on copies with outlier key channels (scales and seeds: STRESS), same function
  short starts    norm and center fixed from the first tokens of the prompt, the rest appended: a context that grows
  kernels         the CPU kernels, with queries rounded to integers and without (``exact``); the chunk is read 32
                  tokens at a time, so that as many tokens are quantized as in ``generate()``

    python benchmarks/bench_key_norm.py                                # everything, a quarter of an hour when idle
    python benchmarks/bench_key_norm.py --prompts 2 --parts kernels    # a quick look at one part
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from render import key_norm_tables  # benchmarks are run as files, so their folder is on the path
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from innerq_compile import InnerQCache, fold_key_norm, ops
from innerq_compile.cache.layer import InnerQLayer
from innerq_compile.compiler.backend import register_kernels
from innerq_compile.demo.evaluate import Prefill, prefill
from innerq_compile.key_norm import fold
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.quant import KEY_NORM_EPS

CALIBRATION_TOKENS = 4096
OUTLIER_SHARE = 1 / 8
"""Of the RoPE pairs of each KV head that a stress model scales up."""

PARTS = ("as trained", "outliers", "short starts", "kernels")

STRESS = ((0, 4.0, 64.0), (1, 4.0, 64.0), (2, 4.0, 16.0), (3, 16.0, 64.0))
"""Seed, smallest and largest scale of the outlier channels of each copy."""

PLAIN = {"key_norm": "off", "key_norm_exponent": 0.5, "rope_pairs": "off", "key_center": "off"}
PAPER = {**PLAIN, "key_norm": "runtime"}
OURS = {"key_norm": "runtime", "key_norm_exponent": 1.0, "rope_pairs": "half", "key_center": "runtime"}
CENTRED = {**PLAIN, "key_center": "runtime"}


@dataclass(frozen=True)
class Trial:
    """A rule for norm and center that no setting offers; everything else is the cache's own.

    The norm is a statistic of ``|k|``, or of ``|k - c|``, shared by RoPE partners and raised to ``exponent``.
    """

    exponent: float = 1.0
    statistic: str = "max"
    center: str = "off"
    of_centred: bool = False
    off_below: float = 0.0

    def __call__(
        self, keys: torch.Tensor, valid: torch.Tensor, config: InnerQConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stands in for :func:`innerq_compile.numerics.quant.key_center_and_norm`; keys are finite here."""
        counted = valid[:, None, :, None]
        number = counted.sum(2)
        low = torch.where(counted, keys, math.inf).amin(2)
        high = torch.where(counted, keys, -math.inf).amax(2)
        mean = torch.where(counted, keys, 0.0).sum(2) / number
        center = {"off": torch.zeros_like(low), "midrange": (low + high) / 2, "mean": mean}[self.center]
        magnitude = torch.where(counted, (keys - center.unsqueeze(2) * self.of_centred).abs(), 0.0)
        norm = magnitude.amax(2) if self.statistic == "max" else (magnitude.square().sum(2) / number).sqrt()
        norm = torch.maximum(norm, norm.roll(norm.shape[-1] // 2, -1))
        balanced = norm.amax(-1, keepdim=True) < self.off_below * norm.median(-1, keepdim=True).values
        norm = torch.where(balanced, 1.0, norm**self.exponent).clamp(min=KEY_NORM_EPS)
        return center, norm


@dataclass(frozen=True)
class Variant:
    """A way to normalize keys: settings of the cache, a rule of its own, a factor folded into the weights."""

    name: str
    settings: dict[str, Any]
    trial: Trial | None = None
    fold: dict[str, Any] | None = None


def trial(name: str, **rule: Any) -> Variant:
    """A run-time rule that is not built in."""
    return Variant(name, OURS, Trial(**rule))


def folded(name: str, settings: dict[str, Any] = PLAIN, rule: Trial | None = None, **fold: Any) -> Variant:
    """A factor taken from calibration text, folded into the weights."""
    return Variant(f"folded, {name}", {**settings, "key_norm": "folded"}, rule, fold)


KEYS_ONLY = {"statistic": "max", "query_strength": 0.0}
RMS_KEYS_MORE = {"statistic": "rms", "strength": 0.65, "query_strength": 0.35}
SHIPPED = [
    Variant("off", PLAIN),
    Variant("off, centred", CENTRED),
    Variant("max^0.5 (paper)", PAPER),
    Variant("max^0.5, centred", {**PAPER, "key_center": "runtime"}),
    Variant("max^1", {**PAPER, "key_norm_exponent": 1.0}),
    Variant("max^1, pairs", {**OURS, "key_center": "off"}),
    Variant("max^1, pairs, centred (default)", OURS),
    folded("max K^0.5 / Q^0.5"),
    folded("max K^0.5 / Q^0.5, centred (default)", CENTRED),
]
"""What settings offer; the kernels serve these."""

TRIALS = [
    trial("off, centred on the mean", exponent=0.0, center="mean"),
    trial("max^0.25, pairs", exponent=0.25),
    trial("max^0.5, pairs, centred", exponent=0.5, center="midrange"),
    trial("max^1, pairs, centred on the mean", center="mean"),
    trial("max of centred^1, pairs, centred", center="midrange", of_centred=True),
    trial("max of centred^1, pairs, centred on the mean", center="mean", of_centred=True),
    trial("max^1, pairs, centred, off below 2", center="midrange", off_below=2.0),
    trial("rms^0.5, pairs", statistic="rms", exponent=0.5),
    trial("rms^1, pairs", statistic="rms"),
    trial("rms of centred^1, pairs, centred", statistic="rms", center="midrange", of_centred=True),
    folded("max^0.5 (paper)", strength=0.5, **KEYS_ONLY),
    folded("max^1", strength=1.0, **KEYS_ONLY),
    folded("max^1, centred", CENTRED, strength=1.0, **KEYS_ONLY),
    folded("max K^0.5 / Q^0.5, centred on the mean", OURS, Trial(exponent=0.0, center="mean")),
    folded("max K^0.5 / Q^0.5, centred, off below 1.5", CENTRED, off_below=1.5),
    folded("rms K^0.65 / Q^0.35", **RMS_KEYS_MORE),
    folded("rms K^0.65 / Q^0.35, centred", CENTRED, **RMS_KEYS_MORE),
    folded("rms K^0.5 / Q^0.5, centred", CENTRED, statistic="rms"),
]


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
def chunk_logits(model: PreTrainedModel, position: int, chunk: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits float32 [chunk, vocabulary] behind the ``position`` tokens that the cache holds."""
    positions = torch.arange(position, position + chunk.shape[1])[None]
    return model(input_ids=chunk, past_key_values=cache, position_ids=positions, use_cache=True).logits[0].float()


@contextlib.contextmanager
def _in_place(rule: Trial | None) -> Iterator[None]:
    """The rule in the place of the built-in one, which kernels would follow: the oracle appends."""
    if rule is None:
        yield
        return

    def append(layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        reference.append_kv(key, value, layer.state, layer.config)

    patch = unittest.mock.patch.object
    with patch(reference, "key_center_and_norm", rule), patch(InnerQLayer, "_append", append):
        yield


def split(prompt: Prefill, start: int) -> list[Prefill]:
    """A prompt as its first ``start`` tokens and the rest."""
    parts = [slice(0, start), slice(start, prompt.num_tokens)]
    cut = [Prefill(prompt.num_tokens, [(k[:, :, p], v[:, :, p]) for k, v in prompt.keys_values]) for p in parts]
    return [part for part in cut if part.keys_values[0][0].shape[2]]


class Study:
    """One model with its prompts read once, measured against ``full``, logits of the undamaged model."""

    def __init__(self, model: PreTrainedModel, text: Text, full: list[torch.Tensor] | None = None) -> None:
        self.model, self.text = model, text
        self.prefills = [prefill(model, prompt) for prompt in text.prompts]
        self.own = [
            chunk_logits(model, p.num_tokens, c, p.load_into(DynamicCache(config=model.config)))
            for p, c in zip(self.prefills, text.chunks, strict=True)
        ]
        self.full = full or self.own
        self.captured = fold._capture(model, text.calibration)  # one capture serves all factors of a model

    @property
    def drift(self) -> float:
        """Largest difference in full precision, as a share of the largest logit."""
        pairs = zip(self.own, self.full, strict=True)
        return max(float((own - full).abs().max() / full.abs().max()) for own, full in pairs)

    def kl(
        self, variant: Variant, all_bits: Sequence[int], *, prompts: int | None = None, start: int = 0,
        exact: bool | None = None,
    ) -> dict[str, list[float]]:  # fmt: skip
        """Nats of the first ``prompts`` prompts, by key bits.

        Args:
            start: Tokens of each prompt that the cache is handed first; 0 for the whole prompt.
            exact: Decodes through the op itself, with this value of its argument.
        """
        with self._folded(variant) as prefills, _in_place(variant.trial):
            cases = list(zip(prefills, self.text.chunks, self.full, strict=True))[:prompts]
            return {
                str(bits): [self._kl(variant, bits, *case, start=start, exact=exact) for case in cases]
                for bits in all_bits
            }

    def _kl(
        self, variant: Variant, bits: int, prompt: Prefill, chunk: torch.Tensor, full: torch.Tensor, *, start: int,
        exact: bool | None,
    ) -> float:  # fmt: skip
        settings = {**variant.settings, "key_bits": bits}
        cache = InnerQCache(self.model.config, "int8", prompt.num_tokens + chunk.shape[1], **settings)
        for part in split(prompt, start) if start else [prompt]:
            part.load_into(cache)
        if exact is None:
            logits = chunk_logits(self.model, prompt.num_tokens, chunk, cache)
        else:
            logits = self._through_the_op(cache, prompt.num_tokens, chunk, exact)
        p, q = full.log_softmax(-1), logits.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    @contextlib.contextmanager
    def _folded(self, variant: Variant) -> Iterator[list[Prefill]]:
        """Folds the model for a while; the prompts' keys follow without reading them again."""
        if variant.fold is None:
            yield self.prefills
            return
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

    def _through_the_op(self, cache: InnerQCache, position: int, chunk: torch.Tensor, exact: bool) -> torch.Tensor:
        def attend(module: Any, query: torch.Tensor, *_: Any, scaling: float, **__: Any) -> tuple[torch.Tensor, None]:
            layer: Any = cache.layers[module.layer_idx]
            out = ops.decode_attention(query, *layer.state, None, scaling, layer.capacity, layer.spec, exact)
            return out.transpose(1, 2), None

        AttentionInterface.register("innerq_op", attend)
        self.model.set_attn_implementation("innerq_op")
        try:
            parts = chunk.split(cache.config.max_fused_q_len, 1)
            begins = [position + cache.config.max_fused_q_len * i for i in range(len(parts))]
            return torch.cat([chunk_logits(self.model, b, p, cache) for b, p in zip(begins, parts, strict=True)])
        finally:
            self.model.set_attn_implementation("sdpa")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The parts as plain data: per variant and key bits the KL of every prompt. Other parts of the file stay."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = read_text(args.model, args)
    plain = Study(model, text)
    fewer = Text(text.calibration, text.prompts[: args.copy_prompts], text.chunks[: args.copy_prompts])
    full = plain.full[: args.copy_prompts]
    copies = [Study(with_outliers(model, *stress), fewer, full) for stress in STRESS]
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    result["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    result["torch"] = torch.__version__
    result["stress"] = [list(s) for s in STRESS]
    result["full_precision_drift_of_copies"] = [study.drift for study in copies]
    result["variants"] = [asdict(v) for v in SHIPPED + TRIALS]

    def record(part: str, variants: list[Variant], measure: Callable[[Variant], Any], *path: str) -> None:
        table = result.setdefault(part, {})
        for name in path:
            table = table.setdefault(name, {})
        table.clear()
        for variant in tqdm(variants, desc=" ".join((part, *path)), mininterval=10):
            table[variant.name] = measure(variant)

    every, all_bits, few = SHIPPED + TRIALS, args.bits, args.prompts // 2
    if "as trained" in args.parts:
        record("as trained", every, lambda v: plain.kl(v, all_bits))
    if "outliers" in args.parts:
        record("outliers", every, lambda v: [study.kl(v, all_bits if v in SHIPPED else [3]) for study in copies])
    if "short starts" in args.parts:
        for start in args.starts:
            record("short starts", every, lambda v, s=start: plain.kl(v, [3], prompts=few, start=s), str(start))
    if "kernels" in args.parts:
        register_kernels()
        for name, exact in (("exact", True), ("integer", False)):
            record("kernels", SHIPPED, lambda v, e=exact: plain.kl(v, all_bits, prompts=few, exact=e), name)
            record("kernels", SHIPPED, lambda v, e=exact: copies[0].kl(v, [3], exact=e), f"{name}, outliers")
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("innerq_compile/demo/model"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/key_norm.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--prompts", type=int, default=12, help="short starts and kernels read half as many")
    parser.add_argument("--copy-prompts", type=int, default=12, help="that each copy with outliers reads")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--starts", type=int, nargs="+", default=[160, 640], help="lengths of the short starts")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if set(PARTS) <= set(result):
        print(key_norm_tables(result))


if __name__ == "__main__":
    main()
