"""The command line: ``innerq demo | generate | eval | explain | env``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Transformer decoding on a 3-bit KV cache.", no_args_is_help=True, pretty_exceptions_enable=False
)

PresetOption = Annotated[
    str, typer.Option(help="Named settings of the cache: base, small, hybrid, int4, int8, paper-*.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ModelOption = Annotated[
    str, typer.Option(help="A causal language model: a directory, or a name that transformers knows.")
]


@app.command()
def demo(
    preset: Annotated[
        list[str] | None, typer.Option(help="Preset to measure; may be repeated. All by default.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=256, max=3500, help="Tokens of text to read.")] = 3072,
    measured_tokens: Annotated[int, typer.Option(min=8, max=512, help="Tokens to decode and measure.")] = 256,
    as_json: JsonOption = False,
) -> None:
    """Read a long text with the reference model and decode on from it with every cache."""
    from innerq_compile.demo.run import ALL_PRESETS, DemoSettings, run_demo

    _quiet_transformers()
    settings = DemoSettings(prompt_tokens=prompt_tokens, measured_tokens=measured_tokens)
    with _user_errors():
        result = run_demo(settings, preset or ALL_PRESETS, progress=sys.stderr.isatty() or not as_json)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    print(
        f"Reference model in {result.dtype}, {prompt_tokens} tokens read, {measured_tokens} decoded one by one, "
        f"{result.threads} threads. Agreement and KL (nats) are against full precision; recall is the share of\n"
        f"{len(settings.recall_distances)} key-value look-ups answered right, {min(settings.recall_distances)} to "
        f"{max(settings.recall_distances)} tokens back. Caches run one after another.\n"
    )
    print(result.table())
    print("\nWhat each writes next:")
    for row in result.rows:
        print(f"\n--- {row.cache}\n{row.text.rstrip()}")


@app.command()
def generate(
    model: ModelOption,
    prompt_file: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="UTF-8 text to continue.")],
    preset: PresetOption = "base",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    full_precision: Annotated[bool, typer.Option(help="Use transformers' own cache, to compare.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a text with any causal language model on an InnerQ cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from innerq_compile.cache.innerq_cache import InnerQCache
    from innerq_compile.compiler.enable import enable
    from innerq_compile.demo.run import FULL, cache_bytes

    _quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    ids = torch.tensor([tokenizer.encode(prompt_file.read_text(encoding="utf-8"))]).to(network.device)
    with _user_errors():
        if full_precision:
            cache: Any = DynamicCache(config=network.config)
        else:
            cache = InnerQCache(network.config, preset=preset, max_cache_len=ids.shape[1] + max_new_tokens)
            enable(network, preset=preset)
    begin = time.perf_counter()
    out = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    seconds = time.perf_counter() - begin
    new = out[0, ids.shape[1] :]
    facts = {
        "preset": FULL if full_precision else preset,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "seconds": seconds,
        "cache_bytes": cache_bytes(cache),
        "text": tokenizer.decode(new),
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(facts["text"])
    print(
        f"\n[{facts['preset']}: {facts['prompt_tokens']} tokens read, {facts['new_tokens']} written in {seconds:.1f} s "
        f"with compilation; cache {facts['cache_bytes'] / 1e6:.2f} MB]",
        file=sys.stderr,
    )


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str, typer.Option(help='A causal language model: a directory, a name that transformers knows, or "smollm2".')
    ] = "smollm2",
    preset: Annotated[
        list[str] | None, typer.Option(help="Preset to measure; may be repeated. All by default.")
    ] = None,
    text: Annotated[str, typer.Option(help="What is read: api, manual, code, or a UTF-8 file.")] = "api",
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of it.")] = 2560,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the first call; they are not scored.")] = 512,
    as_json: JsonOption = False,
) -> None:
    """Measure what each preset costs in quality: KL, perplexity and agreement against full precision."""
    from innerq_compile.demo.run import ALL_PRESETS
    from innerq_compile.evaluation.report import evaluate_presets

    _quiet_transformers()
    with _user_errors():
        result = evaluate_presets(
            model, preset or ALL_PRESETS, text, tokens, prompt_tokens, progress=sys.stderr.isatty() or not as_json
        )
    print(json.dumps(result.to_json()) if as_json else result)


@app.command()
def explain(
    model: ModelOption,
    preset: PresetOption = "base",
    as_json: JsonOption = False,
) -> None:
    """Say which attention sites of a model are rewritten, and why the others are not."""
    from transformers import AutoModelForCausalLM

    from innerq_compile.compiler.explain import explain as explain_model

    _quiet_transformers()
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    with _user_errors():
        report = explain_model(network, preset=preset)
    if as_json:
        print(json.dumps({**json.loads(report.dumps()), "kernels": kernels()}))
        return
    print(report)
    for device, text in kernels().items():
        print(f"{device}: {text}")


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Print versions, devices and the compiler, for a bug report."""
    facts = environment()
    if as_json:
        print(json.dumps(facts))
        return
    from tabulate import tabulate

    print(tabulate(facts.items(), tablefmt="plain"))


def environment() -> dict[str, str]:
    """Versions and devices as plain text, one fact an entry; "absent" for what is not there."""
    import importlib.metadata
    import platform

    import torch

    import innerq_compile

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    cuda = torch.cuda.is_available()
    return {
        "innerq_compile": innerq_compile.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,  # with the build (CPU or CUDA), which the installed metadata leaves out
        **{name: version(name) for name in ("transformers", "triton", "numpy")},
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if cuda else "absent",
        "c++ compiler": _compiler(),
        **kernels(),
    }


def kernels() -> dict[str, str]:
    """Which kernels the ops run on each device that is here; builds those of the CPU if that was not tried yet."""
    import torch

    from innerq_compile.kernels import cpu, triton

    found = {"cpu kernels": cpu.description()}
    if torch.cuda.is_available():
        found["gpu kernels"] = triton.description()
    return found


def _compiler() -> str:
    from innerq_compile.compat import pytorch

    return pytorch.cpp_compiler() or "absent"


def _quiet_transformers() -> None:
    """Leaves the terminal to our own progress bar and result."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turns a ValueError about settings into one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"innerq: {error}", err=True)
        raise typer.Exit(2) from error


def main() -> None:
    """Entry point of the ``innerq`` command."""
    app()
