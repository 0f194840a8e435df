"""Every causal family of transformers, enabled: it computes what it should, or is refused in one line.

For each family a tiny random model generates in full precision, then enabled with windows that hold every token, then
with tokens quantized, then disabled. Graphs of decode steps are rewritten by the passes, as always, but run uncompiled:
compiling two hundred models takes hours, and what becomes of the graphs in Inductor is measured by the rows of
``support_matrix.py``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from families import make_model, tiny_config
from tabulate import tabulate
from transformers import PreTrainedModel

from innerq_compile import InnerQCache, disable, enable, explain
from innerq_compile.passes.decode import run_passes
from innerq_compile.passes.report import REFUSED as LEFT_ALONE
from innerq_compile.passes.report import REWRITTEN, SiteReport
from innerq_compile.refused import Refused, first_line

PROMPT, LONG_PROMPT, NEW_TOKENS = 80, 200, 24
"""The prompts are longer than the models' sliding windows; the long one is quantized with the preset ``base``."""
WIDE = {"sink": 0, "recent": 128}
"""Settings under which nothing of the short prompt and what follows it is quantized."""

WORKS, PARTLY, SIXTEEN, REFUSED, SKIPPED, BROKEN = (
    "works",
    "some layers 16 bit",
    "all layers 16 bit",
    "refused",
    "skipped: its own error",
    "broken",
)
OUTCOMES = (WORKS, PARTLY, SIXTEEN, REFUSED, SKIPPED, BROKEN)


@dataclasses.dataclass(frozen=True)
class Family:
    """What became of one family.

    Attributes:
        outcome: One of :data:`OUTCOMES`; no family may end as ``"broken"``.
        reason: Why layers stay in 16 bit, or the refusal, or the error of the unchanged model.
        layers, quantized, rewritten: Attention layers; those with packed keys and values; sites that read the packed
            codes in the graphs of a decode step (one graph may serve several layers).
        error, budget: Largest error of the enabled model's logits against float64 while nothing is quantized, and what
            it may be: twice that of the unchanged model, plus one rounding of the largest logit.
    """

    model_type: str
    outcome: str
    reason: str = ""
    layers: int = 0
    quantized: int = 0
    rewritten: int = 0
    error: float | None = None
    budget: float | None = None


class _Broken(Exception):  # noqa: N818  never leaves this file
    pass


def survey(model_type: str) -> Family:
    """Runs one family. Nothing it does outlasts the call."""
    torch._dynamo.reset()
    uncompiled = mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, *args, **kwargs: gm.forward)
    with uncompiled, torch.random.fork_rng(devices=[]):
        try:
            model = make_model(tiny_config(model_type))
            expected = _generate(model)
        except Exception as error:  # noqa: BLE001  the model's own, whatever it is
            return Family(model_type, SKIPPED, first_line(error))
        try:
            return _survey_enabled(model_type, model, *expected)
        except _Broken as fault:
            return Family(model_type, BROKEN, str(fault))


def _survey_enabled(model_type: str, model: PreTrainedModel, tokens: torch.Tensor, logits: torch.Tensor) -> Family:
    before = dict(vars(model))
    try:
        enable(model, exact=True, **WIDE)
    except Refused as refusal:
        _demand(vars(model) == before, "enable() refuses the model and has changed it")
        _demand(torch.equal(_generate(model)[0], tokens), "enable() refuses the model, which then generates otherwise")
        _demand(str(refusal) in explain(model).note, "explain() does not say what enable() refuses")
        return Family(model_type, REFUSED, str(refusal).partition(": ")[2])
    except Exception as error:
        raise _Broken(f"enable() raises {first_line(error)}") from error

    with _step("generate() of the enabled model"), _sites_recorded() as sites:
        found, found_logits = _generate(model)
    _demand(torch.equal(found, tokens), f"{int((found != tokens).sum())} tokens differ with nothing quantized")
    error = budget = None
    with contextlib.suppress(RuntimeError):  # a model that has no float64 (XGLM): its tokens must do
        true = _true_logits(model, tokens)
        error, plain = float((found_logits - true).abs().max()), float((logits - true).abs().max())
        budget = 2 * plain + torch.finfo(torch.float32).eps * float(true.abs().max())
    if error is not None and budget is not None:
        fault = f"with nothing quantized logits are off by {error:.2g}, rounding explains {budget:.2g}"
        _demand(error <= budget, fault)

    with _step("generate() with quantized tokens"):
        enable(model)
        _generate(model, LONG_PROMPT, disable_compile=True)
    cache = InnerQCache(model.config)
    quantized = len(cache.layers) - len(cache.unquantized)
    _demand(len(sites) <= quantized, f"{len(sites)} sites in the graphs, {quantized} layers are quantized")
    with _step("explain()"), mock.patch("torch.compile", lambda function, **kwargs: function):
        said = Counter(site.reason for site in explain(model).sites)
    kept = Counter(cache.unquantized.values())
    _demand(said == kept, f"explain() names {said}")

    with _step("disable()"):
        disable(model)
    _demand(torch.equal(_generate(model)[0], tokens), "the disabled model generates otherwise")
    reasons = [f"{count} layer{'s' * (count > 1)}: {reason}" for reason, count in kept.items()]
    reasons += sorted({site.reason for site in sites.values() if site.status == LEFT_ALONE})
    if (
        len(sites) < quantized
    ):  # the graph breaks and one serves several layers, or attention spelled out in its own way
        reasons.append(f"{quantized - len(sites)} quantized without a site of their own in the graphs")
    rewritten = sum(site.status == REWRITTEN for site in sites.values())
    outcome = SIXTEEN if not quantized else PARTLY if kept else WORKS
    return Family(model_type, outcome, "; ".join(reasons), len(cache.layers), quantized, rewritten, error, budget)


@contextlib.contextmanager
def _sites_recorded() -> Iterator[dict[str, SiteReport]]:
    """The decode sites of all graphs that are made meanwhile, by path where one is known: a graph may be made twice."""
    sites: dict[str, SiteReport] = {}

    def record(*args: Any, **kwargs: Any) -> Any:
        report = run_passes(*args, **kwargs)
        seen: Counter[str] = Counter()  # a module may attend to several layers of the cache
        for site in report.sites:
            if site.status in (REWRITTEN, LEFT_ALONE):
                seen[site.path] += 1
                sites[f"{site.path} {seen[site.path]}"] = site
        return report

    with mock.patch("innerq_compile.compiler.backend.run_passes", record):
        yield sites


def _generate(model: PreTrainedModel, length: int = PROMPT, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [1, length + NEW_TOKENS] and the logits of the new ones, float64 [NEW_TOKENS, V]."""
    ids = torch.randint(3, 256, (1, length), generator=torch.Generator().manual_seed(0))
    model.__dict__.pop("_compiled_call_impl", None)  # the prefill: tracing it costs as much as all the rest
    limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    recorded = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **limits, **recorded, **kwargs)
    return out.sequences, torch.stack(out.logits)[:, 0].double()


@torch.no_grad()
def _true_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """float64 logits of the new tokens, by one forward without a cache."""
    exact = disable(copy.deepcopy(model))
    with contextlib.suppress(Exception):  # torch multiplies groups of experts in 16 and 32 bit only
        exact.set_experts_implementation("eager")
    return exact.double().forward(tokens, use_cache=False).logits[0, PROMPT - 1 : -1]


def _demand(holds: bool, fault: str) -> None:
    if not holds:
        raise _Broken(fault)


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Broken(f"{name} raises {first_line(error)}") from error


def table(families: Iterable[Family]) -> str:
    """The families as docs/models.md shows them, by outcome."""
    ordered = sorted(families, key=lambda family: (OUTCOMES.index(family.outcome), family.model_type))
    lines = []
    for family in ordered:
        counted = family.layers > 0
        lines.append(
            [
                f"`{family.model_type}`",
                family.outcome,
                f"{family.quantized} of {family.layers}" if counted else "",
                f"{family.rewritten} of {family.quantized}" if counted else "",
                family.reason.replace("|", "\\|"),
            ]
        )
    headers = ["model type", "outcome", "layers quantized", "rewritten", "what stays in 16 bit, or why"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def summary(families: Iterable[Family]) -> str:
    """One line of counts."""
    counts = Counter(family.outcome for family in families)
    listed = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    return f"{counts.total()} families: {listed}."
