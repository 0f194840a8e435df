"""KL, perplexity and agreement of caches against full precision, each scored token over a quantized past.

All caches read the same text side by side. The first ``prompt`` tokens come in one call, as a user's prompt does; they
attend to exact keys with every cache and are not scored. The rest comes in chunks that are short enough for the decode
path: a chunk attends to the packed past and to its own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

SEGMENT = 128
"""Tokens whose mean is one sample of the standard error: neighbouring tokens err together."""


@dataclass
class Quality:
    """What one cache did to each scored token.

    Attributes:
        kl: KL(full || quantized) of the next-token distributions, in nats.
        loss: Negative log-likelihood of the true next token.
        full_loss: The same in full precision.
        agrees: Whether the most likely token is that of full precision.
    """

    kl: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    full_loss: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)

    def add(self, logits: torch.Tensor, full: torch.Tensor, targets: torch.Tensor) -> None:
        """Scores n tokens: logits and those of full precision [n, vocabulary], the true next tokens [n]."""
        q, p = logits.float().log_softmax(-1), full.float().log_softmax(-1)
        self.kl += (p.exp() * (p - q)).sum(-1).tolist()
        self.loss += (-q.gather(1, targets[:, None])[:, 0]).tolist()
        self.full_loss += (-p.gather(1, targets[:, None])[:, 0]).tolist()
        self.agrees += (q.argmax(-1) == p.argmax(-1)).tolist()

    def summary(self, last: int = 256) -> dict[str, float]:
        """Means with standard errors over segments; ``kl_last`` is that of the last ``last`` tokens alone."""
        more = torch.tensor(self.loss, dtype=torch.float64) - torch.tensor(self.full_loss, dtype=torch.float64)
        kl, agrees = torch.tensor(self.kl, dtype=torch.float64), torch.tensor(self.agrees, dtype=torch.float64)
        return {
            "kl": float(kl.mean()),
            "kl_error": standard_error(kl),
            "kl_last": float(kl[-last:].mean()),
            "perplexity": math.exp(sum(self.loss) / len(self.loss)),
            "perplexity_change": math.expm1(float(more.mean())),
            "perplexity_error": standard_error(more),
            "agreement": float(agrees.mean()),
            "agreement_error": standard_error(agrees),
        }


def standard_error(samples: torch.Tensor) -> float:
    """Standard error of the mean over whole segments of :data:`SEGMENT` samples; NaN below two segments."""
    segments = samples[: len(samples) // SEGMENT * SEGMENT].reshape(-1, SEGMENT).mean(1)
    return float(segments.std() / math.sqrt(len(segments))) if len(segments) > 1 else math.nan


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    caches: Mapping[str, Cache],
    *,
    prompt: int = 512,
    chunk: int = 32,
    progress: bool = True,
) -> dict[str, Quality]:
    """Reads ids [1, T] with every cache, and with a full-precision one beside them.

    Args:
        caches: Empty ones, by name, with room for T tokens.
        prompt: Tokens of the first call.
        chunk: Tokens of every later call; at most what the decode path takes at once.

    Raises:
        ValueError: Fewer than ``prompt`` + 2 tokens.
    """
    total = ids.shape[1]
    if total < prompt + 2:
        raise ValueError(f"the text has {total} tokens, a prompt of {prompt} leaves nothing to score")
    full = DynamicCache(config=model.config)
    found = {name: Quality() for name in caches}
    bounds = [0, *range(prompt, total - 1, chunk), total - 1]
    for begin, end in zip(tqdm(bounds[:-1], disable=not progress, leave=False), bounds[1:], strict=True):
        part, targets = ids[:, begin:end], ids[0, begin + 1 : end + 1]
        exact = model(input_ids=part, past_key_values=full).logits[0] if begin else _first(model, part, full)
        for name, cache in caches.items():
            if begin:
                found[name].add(model(input_ids=part, past_key_values=cache).logits[0], exact, targets)
            else:
                _first(model, part, cache)
    return found


def _first(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0]
