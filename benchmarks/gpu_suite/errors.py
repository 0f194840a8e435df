"""How far an attention output may be from float64: twice what the same rounding costs in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from innerq_compile.config import BLOCK


class Checked(NamedTuple):
    """Relative errors in the 2-norm, over all numbers of an output."""

    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Within the budget; false for NaN."""
        return self.error <= self.budget


def attention64(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sm_scale: float, bias: torch.Tensor | None = None,
    *, q_levels: int = 0, p_levels: int = 0,
) -> torch.Tensor:  # fmt: skip
    """``softmax(sm_scale * q K^T + bias) V`` in float64 with queries and probabilities rounded to integers.

    Args:
        query: [B, Hq, M, D]; keys, values: [B, H, N, D]; bias broadcasts to [B, Hq, M, N].
        q_levels: Largest integer a query is rounded to, per group of 32 channels; 0 leaves it alone.
        p_levels: The same for probabilities, per block of 32 tokens.
    """
    batch, q_heads, q_len, head_dim = query.shape
    heads = keys.shape[1]
    query = _rounded(query.double(), q_levels)
    scores = sm_scale * query.reshape(batch, heads, -1, head_dim) @ keys.double().transpose(2, 3)
    scores = scores.reshape(batch, q_heads, q_len, -1)
    if bias is not None:
        scores = scores + bias
    probs = _rounded(torch.softmax(scores, -1).nan_to_num(0.0), p_levels)
    return (probs.reshape(batch, heads, -1, keys.shape[2]) @ values.double()).reshape(query.shape)


def check(
    out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sm_scale: float,
    bias: torch.Tensor | None = None, *, exact: bool,
) -> Checked:  # fmt: skip
    """Error of ``out`` and its budget.

    ``exact`` outputs may round like attention in the query's dtype, the others like 8-bit queries and 7-bit
    probabilities. Arguments as for :func:`attention64`; ``keys`` and ``values`` are what the cache dequantizes to.
    """
    wanted = attention64(query, keys, values, sm_scale, bias)
    if exact:
        alike = attention64(query, keys.to(query.dtype), values.to(query.dtype), sm_scale, bias)
    else:
        alike = attention64(query, keys, values, sm_scale, bias, q_levels=127, p_levels=127)
    norm = wanted.norm()
    # Scores are summed in float32, and an error of a score is a relative error of its probability.
    largest = sm_scale * float(query.double().norm(dim=-1).amax() * keys.double().norm(dim=-1).amax())
    in_float32 = torch.finfo(torch.float32).eps * max(1.0, largest)
    budget = 2 * (float((alike - wanted).norm() / norm) + torch.finfo(query.dtype).eps + in_float32)
    return Checked(float((out.double() - wanted).norm() / norm), budget)


LOST = (
    "illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert",
    "illegal instruction", "an illegal address",
)  # fmt: skip
"""Words of the errors after which nothing more can be run on the GPU in this process."""


def raise_if_lost(error: Exception) -> None:
    """Raises an error again that has destroyed the process's CUDA context."""
    if any(words in str(error) for words in LOST):
        raise error


def _rounded(x: torch.Tensor, levels: int) -> torch.Tensor:
    if not levels:
        return x
    length = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK))
    step = x.abs().amax(-1, keepdim=True) / levels
    x = torch.where(step > 0, (x / torch.where(step > 0, step, 1.0)).round() * step, 0.0)
    return x.flatten(-2)[..., :length]
