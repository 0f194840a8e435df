"""Token by token with the shipped presets: what the key norm saves in KL and costs in time, at run time and folded.

Quality: the reference model and copies of it with outlier key channels decode held-out text from the quantized cache;
KL in nats against the undamaged model in full precision. Speed: seconds per compiled decode step, the same step with
each norm, measured in turns so that all see the same machine. Keys are centred in every row but the paper's.

    python benchmarks/bench_folded_decode.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_key_norm import read_text, with_outliers  # benchmarks are run as files, so their folder is on the path
from tabulate import tabulate
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from innerq_compile import InnerQCache, fold_key_norm
from innerq_compile.compiler.backend import register_kernels
from innerq_compile.demo.evaluate import Decoded, decode, kl_divergence, prefill

NORMS: dict[str, dict[str, Any]] = {
    "off": {"key_norm": "off"},
    "run time (default)": {},
    "run time, max^0.5 (paper)": {"key_norm_exponent": 0.5, "rope_pairs": "off", "key_center": "off"},
    "folded": {},
}
"""Settings of the cache on top of the preset's; for the last one the model is folded."""


@contextlib.contextmanager
def folded_for(norm: str, model: PreTrainedModel, text: Any) -> Iterator[None]:
    """Folds the model for a while where the norm asks for it."""
    handle = fold_key_norm(model, text.calibration, progress=False) if norm == "folded" else None
    try:
        yield
    finally:
        if handle is not None:
            handle.restore()


def decode_all(model: PreTrainedModel, text: Any, make_cache: Callable[[], Any]) -> torch.Tensor:
    """Logits of every chunk, decoded token by token behind its prompt: float32 [n, vocabulary]."""
    logits = []
    for prompt, chunk in zip(text.prompts, text.chunks, strict=True):
        cache = prefill(model, prompt).load_into(make_cache())
        logits.append(decode(model, cache, prompt.shape[1], chunk).logits)
    return torch.cat(logits)


def quality(model: PreTrainedModel, text: Any, full: Decoded, args: argparse.Namespace) -> dict[str, float]:
    """KL by key norm, and that of full precision."""
    capacity = args.context + args.chunk

    def kl(**settings: Any) -> float:
        def make() -> InnerQCache:
            return InnerQCache(model.config, args.preset, capacity, **settings)

        return kl_divergence(Decoded(decode_all(model, text, make), []), full)

    own = decode_all(model, text, lambda: DynamicCache(config=model.config))
    scores = {"full precision": kl_divergence(Decoded(own, []), full)}
    for norm, settings in NORMS.items():
        with folded_for(norm, model, text):
            scores[norm] = kl(**settings)
    return scores


def step_seconds(model: PreTrainedModel, text: Any, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a compiled decode step by key norm; the fastest of several rounds taken in turns."""
    prompt, chunk = text.prompts[0], text.chunks[0]
    read = prefill(model, prompt)
    found: dict[str, float] = {}
    for _ in range(args.rounds):
        for norm, settings in NORMS.items():
            with folded_for(norm, model, text):
                cache = read.load_into(InnerQCache(model.config, args.preset, args.context + args.chunk, **settings))
                model.compile(backend="innerq")
                decoded = decode(model, cache, prompt.shape[1], chunk)
                model._compiled_call_impl = None
            found[norm] = min(found.get(norm, float("inf")), 1 / decoded.tokens_per_second)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("innerq_compile/demo/model"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/folded_decode.json"))
    parser.add_argument("--preset", default="base")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=2, help="models with outliers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    register_kernels()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = read_text(args.model, args)
    full = Decoded(decode_all(model, text, lambda: DynamicCache(config=model.config)), [])
    models = {"undamaged": model, **{f"outliers {seed}": with_outliers(model, seed) for seed in range(args.seeds)}}
    scores = {name: quality(m, text, full, args) for name, m in tqdm(models.items(), desc="models", leave=False)}
    seconds = step_seconds(model, text, args)
    result = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
    result |= {"torch": torch.__version__, "positions": args.prompts * args.chunk}
    result |= {"kl": scores, "seconds_per_step": seconds}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = [(norm, *(f"{s[norm]:.5f}" for s in scores.values())) for norm in scores["undamaged"]]
    print(tabulate(rows, headers=["key norm", *scores], tablefmt="github", disable_numparse=True))
    print(tabulate([(k, f"{1e3 * v:.3f} ms") for k, v in seconds.items()], headers=["key norm", "decode step"]))


if __name__ == "__main__":
    main()
