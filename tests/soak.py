"""A long generation: constant memory, no recompile, and a cache that equals the reference all the way.

A tiny random Llama is compiled by the ``innerq`` backend and generates token by token. Its cache layers hand out the
raw keys and values of each step, and the reference appends the same ones to a second state; at random steps all
buffers of both must be equal, bit for bit.

Memory is bounded by the smallest leak there is. Python keeps nothing of 16 bytes or more per token, the size of the
smallest object; the process keeps nothing of 256 bytes or more per token, the size of an empty tensor (its
``TensorImpl`` and the smallest allocation of its storage). Neither counts what happens before the warm-up ends.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import resource
import tracemalloc
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from innerq_compile import InnerQCache
from innerq_compile.cache.innerq_cache import InnerQLayer
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import BLOCK
from innerq_compile.numerics.layout import QUANTIZED, LayerState, allocate_state

SMALLEST_OBJECT, SMALLEST_TENSOR = 16, 256
PROMPT, WARM_UP = 100, 200


@dataclasses.dataclass(frozen=True)
class Soak:
    """What was seen.

    Attributes:
        tokens: Generated, warm-up included.
        checkpoints: Steps after which the cache was compared with the reference.
        quantized: Tokens of the last layer that are packed at the end.
        python_growth, process_growth: Bytes that Python's allocator and the whole process kept since the warm-up.
        cache_bytes: Bytes of the cache's buffers, at the warm-up and at the end.
        distinct: Different tokens among those generated.
    """

    tokens: int
    checkpoints: list[int]
    quantized: int
    python_growth: int
    process_growth: int
    cache_bytes: tuple[int, int]
    distinct: int

    def check(self) -> None:
        """Raises ``AssertionError`` where memory grew."""
        steps = self.tokens - WARM_UP
        assert self.cache_bytes[0] == self.cache_bytes[1], self
        assert self.python_growth < SMALLEST_OBJECT * steps, self
        assert self.process_growth < SMALLEST_TENSOR * steps, self
        assert self.quantized > 0 and self.distinct > 1, self


class Recorded(InnerQLayer):
    """A layer that keeps the keys and values of its last update, as they came."""

    last: tuple[torch.Tensor, torch.Tensor]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Appends, and remembers what."""
        self.last = key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)


class Oracle:
    """The reference's idea of one layer's buffers, fed with what that layer was given."""

    def __init__(self, layer: Recorded) -> None:
        self.layer = layer
        keys = layer.last[0]
        self.state = allocate_state(
            layer.config,
            batch_size=keys.shape[0],
            num_kv_heads=keys.shape[1],
            head_dim=keys.shape[3],
            capacity=layer.capacity,
            dtype=keys.dtype,
            device=keys.device,
        )

        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.follow()
        self.catch_up()

    def follow(self) -> None:
        """Takes the layer's last keys and values, and appends them when they make a block.

        The key norm comes from the first keys that are quantized together, so until then each token goes alone.
        """
        self.waiting.append(self.layer.last)
        if len(self.waiting) == BLOCK or not int(self.state.counts[0, QUANTIZED]):
            self.catch_up()

    def catch_up(self) -> None:
        """Appends what was taken; up to one block gives what token by token would."""
        if self.waiting:
            keys, values = (torch.cat(parts, 2) for parts in zip(*self.waiting, strict=True))
            reference.append_kv(keys, values, self.state, self.layer.config)
            self.waiting.clear()

    def differs(self) -> list[str]:
        """Names of the buffers in which the layer differs from the reference."""
        self.catch_up()
        held: LayerState = self.layer.state  # type: ignore[assignment]
        return [name for name in held._fields if not torch.equal(getattr(held, name), getattr(self.state, name))]


def make_model() -> PreTrainedModel:
    """Two layers, random weights, the same ones each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=65536,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def make_cache(model: PreTrainedModel, capacity: int) -> InnerQCache:
    """A cache of ``Recorded`` layers."""
    cache = InnerQCache(model.config, max_cache_len=capacity)
    cache.layers = [Recorded(layer.config, capacity) for layer in cache.layers]
    return cache


@torch.no_grad()
def soak(tokens: int, checkpoints: int, seed: int = 0, progress: bool = False) -> Soak:
    """Generates ``tokens`` tokens and compares at ``checkpoints`` random steps and at the end.

    Raises:
        AssertionError: The cache differs from the reference.
        RecompileError: The decode step was compiled again after the warm-up.
    """
    if tokens <= WARM_UP:
        raise ValueError(f"tokens must be more than the {WARM_UP} of the warm-up, got {tokens}")
    rng = random.Random(seed)
    chosen = sorted({*rng.sample(range(WARM_UP, tokens), checkpoints), tokens - 1})
    model = make_model()
    cache = make_cache(model, PROMPT + tokens)
    generator = torch.Generator().manual_seed(seed)
    model(torch.randint(0, 256, (1, PROMPT), generator=generator), past_key_values=cache)
    oracles = [Oracle(layer) for layer in cache.layers]
    torch._dynamo.reset()
    step = torch.compile(model, backend="innerq", fullgraph=True)
    token = torch.zeros(1, 1, dtype=torch.long)
    seen = torch.zeros(256, dtype=torch.long)
    before = None
    with tqdm(total=tokens, disable=not progress) as bar:
        for index in range(tokens):
            if index == WARM_UP // 2:
                tracemalloc.start()  # not before: compiling under it takes minutes
            if index == WARM_UP:
                before = used_memory(), cache.memory_bytes
                torch._dynamo.config.error_on_recompile = True
            probabilities = step(token, past_key_values=cache).logits[:, -1].softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)
            seen[token[0, 0]] += 1
            for oracle in oracles:
                oracle.follow()
            if index in chosen:
                for number, oracle in enumerate(oracles):
                    assert not oracle.differs(), f"token {index}, layer {number}: {oracle.differs()}"
            bar.update()
    torch._dynamo.config.error_on_recompile = False
    assert before is not None
    after = used_memory()
    tracemalloc.stop()
    return Soak(
        tokens=tokens,
        checkpoints=chosen,
        quantized=int(cache.layers[-1].state.counts[0, 1]),
        python_growth=after[0] - before[0][0],
        process_growth=after[1] - before[0][1],
        cache_bytes=(before[1], cache.memory_bytes),
        distinct=int((seen > 0).sum()),
    )


def used_memory() -> tuple[int, int]:
    """Bytes that Python's allocator holds, and bytes of the process in memory (its peak where /proc is missing)."""
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    pages = Path("/proc/self/statm")
    if pages.exists():
        return held, int(pages.read_text().split()[1]) * resource.getpagesize()
    return held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 20000,
    checkpoints: Annotated[int, typer.Option(help="Random steps at which the cache is compared.")] = 40,
    seed: Annotated[int, typer.Option(help="Chooses prompt, tokens and checkpoints.")] = 0,
) -> None:
    """Prints what was seen as a line of JSON; fails where something is wrong."""
    result = soak(tokens, checkpoints, seed, progress=True)
    print(json.dumps(dataclasses.asdict(result)))  # noqa: T201 its product
    result.check()


if __name__ == "__main__":
    typer.run(main)
