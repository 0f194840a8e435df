"""The demonstration: one model, one long text, every cache; rows for one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from innerq_compile.cache.innerq_cache import InnerQCache
from innerq_compile.compiler.enable import disable, enable
from innerq_compile.demo import evaluate
from innerq_compile.numerics.config import PRESETS, InnerQConfig

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""The reference model, its tokenizer and ``heldout.txt``, text that it was not trained on."""

FULL = "full precision"


@dataclass(frozen=True)
class DemoSettings:
    """How much the demonstration reads: tokens of the text, of the measured continuation, of the shown one."""

    prompt_tokens: int = 3072
    measured_tokens: int = 256
    shown_tokens: int = 32
    recall_tasks: int = 21
    seed: int = 0

    @property
    def recall_distances(self) -> list[int]:
        """How far back each look-up reaches: evenly from a sixth of the prompt to nearly all of it.

        A look-up's own prompt is a little longer than its distance and must fit the caches of this prompt.
        """
        nearest, farthest = self.prompt_tokens // 6, self.prompt_tokens - 128
        steps = self.recall_tasks - 1
        return [nearest + (farthest - nearest) * number // steps for number in range(self.recall_tasks)]

    @property
    def max_cache_len(self) -> int:
        """Capacity of the caches that have one."""
        return self.prompt_tokens + max(self.measured_tokens, self.shown_tokens + 1)


@dataclass(frozen=True)
class Contender:
    """One row: a cache and the way the model is compiled for it."""

    name: str
    bits_per_number: float
    make_cache: Callable[[], Cache]
    prepare: Callable[[PreTrainedModel], object] | None


@dataclass(frozen=True)
class Row:
    """What was measured of one contender. KL in nats; accuracy and agreement as shares."""

    cache: str
    bits_per_number: float
    cache_bytes: int
    ratio: float
    tokens_per_second: float
    agreement: float
    kl: float
    perplexity: float
    recall: float
    text: str

    HEADERS = ("cache", "bits", "MB", "smaller", "tokens/s", "agree", "KL", "perplexity", "recall")

    def cells(self) -> tuple[str, ...]:
        """The row as it stands in the table."""
        return (
            self.cache,
            f"{self.bits_per_number:.2f}",
            f"{self.cache_bytes / 1e6:.2f}",
            f"{self.ratio:.2f}x",
            f"{self.tokens_per_second:.0f}",
            f"{100 * self.agreement:.1f} %",
            f"{self.kl:.4f}",
            f"{self.perplexity:.3f}",
            f"{100 * self.recall:.0f} %",
        )


@dataclass(frozen=True)
class DemoResult:
    """All rows, with the conditions they were measured under."""

    settings: DemoSettings
    dtype: str
    threads: int
    rows: list[Row]

    def table(self) -> str:
        """The table of the README."""
        cells = [row.cells() for row in self.rows]
        return tabulate(cells, headers=Row.HEADERS, tablefmt="github", disable_numparse=True)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def run_demo(settings: DemoSettings, presets: list[str], progress: bool = True) -> DemoResult:
    """Measures full precision, transformers' StaticCache under Inductor, and the InnerQ presets.

    Raises:
        ValueError: An unknown preset.
    """
    for preset in presets:
        InnerQConfig.from_preset(preset)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).eval()
    text = (MODEL_DIR / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False, verbose=False)])
    needed = settings.prompt_tokens + settings.measured_tokens + 1
    ids, rest = ids[:, :needed], tokenizer.decode(ids[0, needed:])

    contenders = list(_contenders(model, settings, presets))
    with tqdm(total=len(contenders) + 1, desc="reading the text", disable=not progress, leave=False) as bar:
        prompt = evaluate.prefill(model, ids[:, : settings.prompt_tokens])
        tasks = evaluate.recall_tasks(tokenizer, rest, settings.recall_distances, settings.seed)
        prefills = evaluate.recall_prefills(model, tasks)
        bar.update()
        rows: list[Row] = []
        full: evaluate.Decoded | None = None
        for contender in contenders:
            bar.set_description(contender.name)
            with _prepared(model, contender):
                cache = prompt.load_into(contender.make_cache())
                inputs = ids[:, settings.prompt_tokens : -1]
                decoded = evaluate.decode(model, cache, settings.prompt_tokens, inputs)
                full = full or decoded
                recall = evaluate.recall_accuracy(model, contender.make_cache, tasks, prefills)
                shown = _continue(model, tokenizer, prompt, contender, ids, settings)
            size = cache_bytes(cache)
            rows.append(
                Row(
                    cache=contender.name,
                    bits_per_number=contender.bits_per_number,
                    cache_bytes=size,
                    ratio=(rows[0].cache_bytes if rows else size) / size,
                    tokens_per_second=decoded.tokens_per_second,
                    agreement=evaluate.agreement(decoded, full),
                    kl=evaluate.kl_divergence(decoded, full),
                    perplexity=evaluate.perplexity(decoded, ids[0, settings.prompt_tokens + 1 :]),
                    recall=recall,
                    text=shown,
                )
            )
            bar.update()
    return DemoResult(settings, str(model.dtype).removeprefix("torch."), torch.get_num_threads(), rows)


def cache_bytes(cache: Cache) -> int:
    """Bytes that the buffers of any transformers cache occupy."""
    if isinstance(cache, InnerQCache):
        return cache.memory_bytes
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def _contenders(model: PreTrainedModel, settings: DemoSettings, presets: list[str]) -> Iterator[Contender]:
    config = model.config
    max_cache_len = settings.max_cache_len
    yield Contender(FULL, 16.0, partial(DynamicCache, config=config), None)
    yield Contender(
        "StaticCache + Inductor",
        16.0,
        partial(StaticCache, config=config, max_cache_len=max_cache_len),
        PreTrainedModel.compile,
    )
    for preset in presets:
        yield Contender(
            preset,
            InnerQConfig.from_preset(preset).bits_per_number,
            partial(InnerQCache, config, preset=preset, max_cache_len=max_cache_len),
            partial(enable, preset=preset),
        )


@contextmanager
def _prepared(model: PreTrainedModel, contender: Contender) -> Iterator[None]:
    """Compiles the model for one contender, and undoes it: compiled graphs of another cache would be tried first."""
    torch.compiler.reset()
    if contender.prepare is not None:
        contender.prepare(model)
    try:
        yield
    finally:
        disable(model)


def _continue(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: evaluate.Prefill,
    contender: Contender,
    ids: torch.Tensor,
    settings: DemoSettings,
) -> str:
    """What ``generate()`` continues the text with."""
    cache = prompt.load_into(contender.make_cache())
    begin = ids[:, : settings.prompt_tokens + 1]
    out = model.generate(
        begin,
        attention_mask=torch.ones_like(begin),
        past_key_values=cache,
        max_new_tokens=settings.shown_tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(out[0, begin.shape[1] :]))


ALL_PRESETS = ["int8", "int4", *(name for name in PRESETS if name not in ("int8", "int4"))]
"""Presets in the order of the table: from the most bits to the fewest, the published numerics last."""
