"""Train the reference model: a small Llama that looks things up far back in its context.

Runs on two CPU cores in little more than an hour. A run can be stopped at any time;
started again with the same output directory it goes on from its last checkpoint. Batch
`n` is a function of the seed and `n` alone, so a resumed run sees the same text.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from corpus import Corpus, heldout_excerpt, load_corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from innerq_compile.demo import tasks

log = logging.getLogger("train")

CONTEXT = 4096
VOCAB = 3072
END = "<|end|>"
MATRIX_LR = 4e-3
EMBEDDING_LR = 3e-3
WARMUP = 150
DECAY_SHARE = 0.2
SAVE_EVERY = 50


@dataclass(frozen=True)
class Stage:
    """A run of steps with one window length and one mixture of documents."""

    steps: int
    length: int
    batch: int
    recall: float
    arithmetic: float
    repeats: float  # the rest of the mixture is ordinary text
    jumps: float  # share of recall windows whose position ids skip ahead


SCHEDULE: tuple[Stage, ...] = (
    Stage(900, 256, 24, recall=0.55, arithmetic=0.10, repeats=0.15, jumps=0.3),
    Stage(450, 512, 14, recall=0.45, arithmetic=0.20, repeats=0.05, jumps=0.6),
    Stage(300, 1024, 8, recall=0.35, arithmetic=0.15, repeats=0.03, jumps=0.6),
    Stage(150, 2048, 4, recall=0.40, arithmetic=0.12, repeats=0.02, jumps=0.5),
    Stage(320, 4096, 2, recall=0.45, arithmetic=0.10, repeats=0.00, jumps=0.0),
)
TOTAL_STEPS = sum(stage.steps for stage in SCHEDULE)


@dataclass(frozen=True)
class Batch:
    """Token ids and positions `[B, T]`, with the label and loss weight of every position."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; digits stay single tokens, so a value is as long as it looks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    # Every key of the recall task becomes one token: the task is to find it, not to spell it.
    rng = Random(0)
    lines = [tasks.RECORD.format(key=key, value="") for key in tasks.KEYS] * 1500
    lines += [tasks.QUERY.format(key=key) for key in tasks.KEYS] * 1500
    lines += ["".join(tasks.word_problem(rng)) for _ in range(5000)]
    tokenizer.train_from_iterator(texts + lines, trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The form that `AutoTokenizer` reads; one special token plays every part."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An unmodified `transformers` Llama with grouped-query attention."""
    end = tokenizer.eos_token_id
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    # Slow rotations keep a match between equal keys alive across the whole context.
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special, rope_parameters=rope, tie_word_embeddings=True))


class Batches:
    """Training windows, made on the fly from the step number."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._filler = tasks.Filler("\n".join(texts))
        self._seed = seed

    def batch(self, step: int, stage: Stage) -> Batch:
        """The windows of one step."""
        rng = Random(f"{self._seed}-{step}")
        rows = [self._window(rng, stage) for _ in range(stage.batch)]
        ids, weights, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
        return Batch(ids[:, :-1], positions[:, :-1], ids[:, 1:].contiguous(), weights[:, 1:])

    def _window(self, rng: Random, stage: Stage) -> tuple[list[int], list[float], list[int]]:
        count = stage.length + 1
        kind = rng.random()
        positions = list(range(count))
        if kind < stage.recall:
            keys = rng.randint(4, max(8, min(100, stage.length // 24)))
            # Longer windows hold more text between the records, up to a sparse document.
            rate, chars = rng.uniform(0.1, 0.5), rng.choice((60, 150, 400))
            spans = tasks.recall_spans(rng, self._filler, keys=keys, filler_rate=rate, filler_chars=chars)
            if rng.random() < stage.jumps:
                positions = jumped_positions(rng, count)
        elif kind < stage.recall + stage.arithmetic:
            spans = tasks.arithmetic_spans(rng, self._filler, filler_chars=300)
        elif kind < stage.recall + stage.arithmetic + stage.repeats:
            return *repeated_tokens(rng, count), positions
        else:
            # The newlines behind the piece only matter where the corpus ends inside the window.
            text = self._filler.piece(rng, 8 * count)
            spans = iter([tasks.Span(text, tasks.TEXT_LOSS), *[tasks.Span("\n", 0.0)] * count])
        return *self._fill(spans, count), positions

    def _fill(self, spans: Iterator[tasks.Span], count: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < count:
            span = next(spans)
            tokens = self._tokenizer.encode(span.text, add_special_tokens=False).ids
            ids += tokens
            weights += [span.weight] * len(tokens)
        return ids[:count], weights[:count]


def jumped_positions(rng: Random, count: int) -> list[int]:
    """Positions of a short window that skip ahead, so that it contains long distances."""
    spare = CONTEXT - count
    cuts = {rng.randrange(1, count): 0 for _ in range(rng.randint(1, 3))}
    for cut in cuts:
        cuts[cut] = rng.randint(0, spare)
        spare -= cuts[cut]
    positions = []
    position = -1
    for index in range(count):
        position += 1 + cuts.get(index, 0)
        positions.append(position)
    return positions


def repeated_tokens(rng: Random, count: int) -> tuple[list[int], list[float]]:
    """Random tokens said again and again: the purest lesson in copying."""
    span = [rng.randrange(1, VOCAB) for _ in range(rng.randint(8, count // 2))]
    ids = (span * (count // len(span) + 1))[:count]
    return ids, [tasks.NO_LOSS] * len(span) + [tasks.TEXT_LOSS] * (count - len(span))


def hidden_states(model: LlamaForCausalLM, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The stock decoder layers, called without a mask object.

    `LlamaModel.forward` reads a skip in the position ids as the start of a packed sequence
    and would mask the past; here the past stays visible and attention stays causal.
    """
    inner = model.model
    hidden = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(hidden, at)
    for layer in inner.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=at, position_embeddings=rotary)
    return inner.norm(hidden)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy, every token counted by its weight."""
    logits = model.lm_head(hidden_states(model, batch.ids, batch.positions))
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="none")
    weights = batch.weights.flatten()
    return (losses * weights).sum() / weights.sum()


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=EMBEDDING_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def lr_scale(step: int) -> float:
    """Warm up, stay, then fall linearly over the last part of the schedule."""
    left = (TOTAL_STEPS - step) / (DECAY_SHARE * TOTAL_STEPS)
    return min(1.0, (step + 1) / WARMUP, max(0.01, left))


def stage_at(step: int) -> Stage:
    """The stage that a step belongs to."""
    for stage in SCHEDULE:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError("step is past the end of the schedule")


@torch.no_grad()
def probe_recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, distance: int, n: int
) -> float:
    """Share of prompts whose whole value is the most likely continuation."""
    rng = Random(distance)
    filler = tasks.Filler(text)
    right = 0
    for _ in range(n):
        prompt = tasks.recall_prompt(rng, tokenizer, filler, distance=distance)
        ids = tokenizer.encode(prompt.text, add_special_tokens=False)
        answer = tokenizer.encode(prompt.answer, add_special_tokens=False)
        row = torch.tensor([ids + answer])[:, -CONTEXT:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(row[:, :-1], logits_to_keep=len(answer)).logits
        right += logits[0].argmax(-1).tolist() == answer
    return right / n


@dataclass
class Progress:
    """How far a run has come, over all its resumptions."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_state(path: Path, progress: Progress, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer]) -> None:
    """Write everything a resumed run needs; the old file lives until the new one is whole."""
    state = {"progress": asdict(progress), "model": model.state_dict()}
    state["optimizers"] = [opt.state_dict() for opt in opts]
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def export(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    """Write the files that `from_pretrained` reads, in bf16, and the held-out text."""
    out.mkdir(parents=True, exist_ok=True)
    shipped = LlamaForCausalLM(model.config)
    shipped.load_state_dict(model.state_dict())
    end = tokenizer.eos_token_id
    shipped.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    shipped.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "heldout.txt").write_text(heldout_excerpt(corpus), encoding="utf-8")


def train(out: Path, seed: int, compiled: bool, stop_at: int) -> None:
    """Run the schedule from wherever the output directory stands."""
    torch.manual_seed(seed)
    corpus = load_corpus()
    tokenizer_path = out / "tokenizer.json"
    if not tokenizer_path.exists():
        build_tokenizer(corpus.train).save(str(tokenizer_path))
    tokenizer = wrap_tokenizer(Tokenizer.from_file(str(tokenizer_path)))
    model = build_model(tokenizer)
    optimizers = build_optimizers(model)
    base_lrs = [opt.param_groups[0]["lr"] for opt in optimizers]
    progress = Progress()
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path)
        progress = Progress(**state["progress"])
        model.load_state_dict(state["model"])
        for opt, saved in zip(optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
    batches = Batches(tokenizer, corpus.train, seed)
    probe_text = "\n".join(corpus.heldout)
    loss_fn = torch.compile(weighted_loss, dynamic=False) if compiled else weighted_loss
    average = math.nan
    last = min(stop_at, TOTAL_STEPS)
    with tqdm(total=last, initial=progress.step, mininterval=30) as bar:
        while progress.step < last:
            started = time.perf_counter()
            stage = stage_at(progress.step)
            for opt, lr in zip(optimizers, base_lrs, strict=True):
                opt.param_groups[0]["lr"] = lr * lr_scale(progress.step)
            batch = batches.batch(progress.step, stage)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in optimizers:
                opt.step()
                opt.zero_grad()
            value = loss.item()
            average = value if math.isnan(average) else 0.98 * average + 0.02 * value
            progress.step += 1
            progress.tokens += batch.ids.numel()
            progress.seconds += time.perf_counter() - started
            bar.update()
            bar.set_postfix(loss=f"{average:.3f}", T=stage.length, refresh=False)
            if progress.step % SAVE_EVERY == 0 or progress.step == last:
                distances = [d for d in (100, 300, 1000, 3000) if d <= 2 * stage.length]
                recall = {d: probe_recall(model, tokenizer, probe_text, d, 20) for d in distances}
                log.info(json.dumps(asdict(progress) | {"loss": average, "recall": recall}))
                save_state(state_path, progress, model, optimizers)
    export(out / "model", model, tokenizer, corpus)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="fuse with torch.compile")
    parser.add_argument("--stop-at", type=int, default=TOTAL_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    log.addHandler(logging.FileHandler(args.out / "train.log"))
    torch.set_num_threads(args.threads)
    train(args.out, args.seed, args.compile, args.stop_at)


if __name__ == "__main__":
    main()
