"""Which models decode from packed codes: tiny random models of every family, run, and what came of it.

For each model: how many layers are quantized and why the others are not; how many attention sites are rewritten for
each ``attn_implementation``, and why not; whether ``enable(model, exact=True)`` generates the tokens of the uncompiled
model; and whether its logits stay within twice the error that the uncompiled model makes against float64, over the same
codes, plus one rounding of the largest logit. Then every family that transformers knows, not compiled: see
``family_sweep.py``. The result is a JSON file and the tables in docs/models.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import families
import family_sweep
import torch
import typer
from tabulate import tabulate
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from innerq_compile import InnerQCache, disable, enable, explain
from innerq_compile.cli import environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "support_matrix.json"
DOCUMENT = ROOT / "docs" / "models.md"
MATRIX, FAMILIES = "support matrix", "every family"
"""Names of the two tables in the document, see :func:`shown`."""

IMPLEMENTATIONS = ("sdpa", "eager")
PROMPT, NEW_TOKENS, CAPACITY = 200, 160, 512
STEPS = 8
"""Decode steps whose logits are compared: none of them quantizes anything, so all runs read the same codes."""

COMMON = {
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # the default makes a random model repeat one token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # a random model with tied ones repeats its input
}
WIDE = {**COMMON, "hidden_size": 128, "max_position_embeddings": 1024}
SMALL = {**WIDE, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32}
GROUPED = {**WIDE, "intermediate_size": 96, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", SMALL),
    "Mistral": ("mistral", {**SMALL, "sliding_window": None}),
    "Mistral 7B v0.1 (all layers sliding)": ("mistral", {**SMALL, "sliding_window": 64}),
    "Qwen2": ("qwen2", SMALL),
    "Qwen3": ("qwen3", SMALL),
    "Qwen3-MoE": ("qwen3_moe", {**SMALL, **EXPERTS, "num_experts": 4}),
    "Gemma 2": ("gemma2", {**SMALL, "sliding_window": 64, "query_pre_attn_scalar": 32}),
    "Gemma 3": ("gemma3_text", {**SMALL, "num_hidden_layers": 6, "sliding_window": 64, "query_pre_attn_scalar": 32}),
    "Phi-3": ("phi3", GROUPED),
    "GPT-2": ("gpt2", {**COMMON, "n_embd": 128, "n_positions": 1024}),
    "GPT-NeoX": ("gpt_neox", {**WIDE, "intermediate_size": 96}),
    "OPT": ("opt", {**WIDE, "ffn_dim": 96, "word_embed_proj_dim": 128, "init_std": 0.2}),
    "Falcon": ("falcon", {**COMMON, "hidden_size": 128, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "StableLM": ("stablelm", GROUPED),
    "OLMo 2": ("olmo2", GROUPED),
    "Cohere": ("cohere", {**GROUPED, "logit_scale": 1.0}),
    "Cohere 2": ("cohere2", {**SMALL, "num_hidden_layers": 4, "sliding_window": 64, "logit_scale": 1.0}),
    "GLM-4": ("glm4", SMALL),
    "SmolLM3": ("smollm3", {**SMALL, "num_hidden_layers": 4}),
    "gpt-oss": ("gpt_oss", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            **WIDE,
            **EXPERTS,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Sites:
    """What the passes made of a model's decode step.

    Attributes:
        found, rewritten, refused: Sites that read a quantized cache, see :class:`innerq_compile.passes.report.Report`.
        reasons: Why sites were refused, each once.
    """

    found: int
    rewritten: int
    refused: int
    reasons: list[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        layers, quantized: Attention layers, and those among them with packed keys and values.
        kept: Why a layer keeps its 16-bit buffers -> how many do.
        sites: Attention implementation -> its sites, for those that the model offers.
        used: The implementation that the model uses unless told otherwise: what the rest was run with.
        same_tokens: Whether compiled and uncompiled generation agree; ``None`` where it was not compiled.
        logits_error, logits_budget: Largest error of the compiled logits against float64, and what it may be.
    """

    model: str
    model_type: str
    layers: int
    quantized: int
    kept: dict[str, int]
    sites: dict[str, Sites]
    used: str
    same_tokens: bool | None = None
    logits_error: float | None = None
    logits_budget: float | None = None

    @property
    def within_budget(self) -> bool | None:
        """Whether the logits of the compiled model are as good as those of the uncompiled one."""
        if self.logits_error is None or self.logits_budget is None:
            return None
        return self.logits_error <= self.logits_budget


def make_config(name: str) -> PreTrainedConfig:
    """The configuration of a tiny model of family ``name``."""
    model_type, settings = MODELS[name]
    return AutoConfig.for_model(model_type, **settings)


def make_model(config: PreTrainedConfig, implementation: str | None = None) -> PreTrainedModel:
    """A model of random float32 weights, the same ones each time."""
    torch.manual_seed(0)
    chosen = {"attn_implementation": implementation} if implementation else {}
    return AutoModelForCausalLM.from_config(config, **chosen).eval()


def survey(name: str) -> Row:
    """Everything that can be said about a model without compiling it."""
    sites: dict[str, Sites] = {}
    for implementation in IMPLEMENTATIONS:
        torch._dynamo.reset()
        try:
            model = make_model(make_config(name), implementation)
        except ValueError:  # the model does not offer it
            continue
        report = explain(model)
        reasons = sorted({site.reason for site in report.sites if site.status == "refused"})
        sites[implementation] = Sites(report.found, report.rewritten, report.refused, reasons)
    config = make_config(name)
    used = make_model(config).config._attn_implementation
    cache = InnerQCache(config, max_cache_len=CAPACITY)
    return Row(
        model=name,
        model_type=config.model_type,
        layers=len(cache.layers),
        quantized=len(cache.layers) - len(cache.unquantized),
        kept=dict(Counter(cache.unquantized.values())),
        sites=sites,
        used=used,
    )


def compare(row: Row) -> Row:
    """Compiles a model and compares it with itself uncompiled."""
    model = make_model(make_config(row.model))
    torch._dynamo.reset()
    expected = generate(model)
    if len(expected[0, PROMPT:].unique()) < 8:
        raise RuntimeError(f"the random {row.model} repeats itself: its tokens show nothing")
    enable(model, exact=True)
    torch._dynamo.utils.counters.clear()
    same = torch.equal(generate(model), expected)
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        raise RuntimeError(f"{row.model} was not compiled")
    error, budget = logits_error(model)
    disable(model)
    return dataclasses.replace(row, same_tokens=same, logits_error=error, logits_budget=budget)


def generate(model: PreTrainedModel) -> torch.Tensor:
    """Greedy tokens [1, PROMPT + NEW_TOKENS] over a quantized cache."""
    cache = InnerQCache(model.config, max_cache_len=CAPACITY)
    return model.generate(
        prompt(),
        attention_mask=torch.ones_like(prompt()),
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )


def prompt() -> torch.Tensor:
    """Random token ids [1, PROMPT], the same each time; none of them is the padding token."""
    return torch.randint(1, 256, (1, PROMPT), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_error(model: PreTrainedModel) -> tuple[float, float]:
    """Largest error of an enabled model's logits against float64, and twice that of its uncompiled forward.

    All three read the codes of one float32 prefill.
    """
    exact = make_model(make_config_like(model), model.config._attn_implementation).double()
    exact.set_experts_implementation("eager")  # torch multiplies groups of experts in 16 and 32 bit only
    runs: list[tuple[Callable[..., Any], InnerQCache]] = []
    for run in (model, model.forward, exact):
        cache = InnerQCache(model.config, max_cache_len=CAPACITY)
        model.forward(prompt(), past_key_values=cache)
        runs.append((run, cache))
    to_double(runs[-1][1])

    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    compiled_error = plain_error = largest = 0.0
    token = prompt()[:, -1:]
    for step in range(STEPS):
        extra = {"position_ids": torch.tensor([[PROMPT + step]])} if takes_positions else {}
        compiled, plain, reference = (
            run(token, past_key_values=cache, **extra).logits[:, -1].double() for run, cache in runs
        )
        compiled_error = max(compiled_error, float((compiled - reference).abs().max()))
        plain_error = max(plain_error, float((plain - reference).abs().max()))
        largest = max(largest, float(reference.abs().max()))
        token = plain.argmax(-1, keepdim=True)
    return compiled_error, 2 * plain_error + torch.finfo(torch.float32).eps * largest


def make_config_like(model: PreTrainedModel) -> PreTrainedConfig:
    """A fresh copy of a model's configuration: two models must not share one."""
    return type(model.config).from_dict(model.config.to_dict())


def to_double(cache: InnerQCache) -> None:
    """Widens the 16-bit parts of a float32 cache, so that a float64 model can go on with it; the codes stay."""
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        if state is not None:
            layer.state = state._replace(k_window=state.k_window.double(), v_window=state.v_window.double())
        else:
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
        layer.dtype = torch.float64


def table(rows: Iterable[Row]) -> str:
    """The rows as docs/models.md shows them."""
    lines = []
    for row in rows:
        rewritten = [
            f"{row.sites[name].rewritten} of {row.sites[name].found}" if name in row.sites else "no such option"
            for name in IMPLEMENTATIONS
        ]
        reasons = [f"{count} layer{'s' * (count > 1)}: {reason}" for reason, count in row.kept.items()]
        reasons += sorted({reason for sites in row.sites.values() for reason in sites.reasons})
        verdict = {True: "yes", False: "**no**", None: ""}
        lines.append(
            [
                row.model,
                f"{row.quantized} of {row.layers}",
                *rewritten,
                verdict[row.same_tokens and row.within_budget],
                "; ".join(reasons),
            ]
        )
    headers = ["model", "layers quantized", "rewritten, sdpa", "rewritten, eager", "same output", "what stays, and why"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def load() -> list[Row]:
    """The rows of the committed result."""
    rows = _result()["rows"]
    return [Row(**{**row, "sites": {name: Sites(**sites) for name, sites in row["sites"].items()}}) for row in rows]


def load_families() -> list[family_sweep.Family]:
    """The families of the committed result."""
    return [family_sweep.Family(**family) for family in _result()["families"]]


def document(text: str, rows: Iterable[Row], swept: Iterable[family_sweep.Family]) -> str:
    """docs/models.md with its tables renewed."""
    swept = list(swept)
    tables = {MATRIX: table(rows), FAMILIES: f"{family_sweep.summary(swept)}\n\n{family_sweep.table(swept)}"}
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: make matrix -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _, block=f"{begin}\n{lines}\n{end}": block, text)  # type: ignore[misc]
    return text


def _result() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return result


def main(
    models: Annotated[list[str], typer.Option("--model", help="A row of the table; may be repeated.")] = [],  # noqa: B006 typer reads it once
    types: Annotated[list[str], typer.Option("--family", help="A model type of the sweep; may be repeated.")] = [],  # noqa: B006
    compiled: Annotated[bool, typer.Option(help="Also compile each model of the table and compare.")] = True,
    write: Annotated[bool, typer.Option(help="Store the results and put the tables into docs/models.md.")] = False,
) -> None:
    """Prints the tables, all of them unless models or families are named, and stores with --write what was run."""
    named = bool(models or types)
    rows = []
    for name in tqdm(models or (() if named else MODELS), disable=None):
        row = survey(name)
        rows.append(compare(row) if compiled else row)
    swept = [family_sweep.survey(name) for name in tqdm(types or (() if named else families.MODEL_TYPES), disable=None)]
    if write:
        old_rows, old_families = ({}, {}) if not named else (_by_name(load()), _by_name(load_families()))
        all_rows = {**old_rows, **_by_name(rows)}
        all_families = dict(sorted({**old_families, **_by_name(swept)}.items()))
        result = {
            "environment": environment(),
            "rows": [dataclasses.asdict(row) for row in all_rows.values()],
            "families": [dataclasses.asdict(family) for family in all_families.values()],
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(document(text, all_rows.values(), all_families.values()), encoding="utf-8")
    print(table(rows), family_sweep.table(swept), sep="\n\n")
    print(json.dumps([dataclasses.asdict(one) for one in (*rows, *swept)]))


def _by_name(entries: Iterable[Any]) -> dict[str, Any]:
    return {getattr(entry, "model", None) or entry.model_type: entry for entry in entries}


if __name__ == "__main__":
    typer.run(main)
