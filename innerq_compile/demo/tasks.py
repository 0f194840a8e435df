"""Tasks whose answer lies far back in the context: key-value recall and word problems.

The same text serves training (`recall_spans`, `arithmetic_spans`: endless streams of
weighted spans) and evaluation (`recall_prompt`, `arithmetic_prompt`: one prompt, one
expected continuation). Every generator takes its own `random.Random` and the filler
text as a string, so a seed and a file fix the task on every Python version.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

_KEY_WORDS = """
    amber anchor apple arrow aspen atlas autumn badge bamboo banjo basin beacon bear berry birch bishop bottle
    bridge bronze brook butter cabin cactus camel candle canoe canyon carbon castle cedar cello chalk cherry
    circus citrus clay cliff clover cobalt cobra comet copper coral cotton coyote crane crater crimson crow
    crystal dagger daisy dawn deer delta desert diamond dingo dolphin donkey dragon drum dune eagle ember
    emerald falcon feather fern fiddle finch flint forest fox galaxy garden garnet ginger glacier goat gold
    goose granite grape guitar hammer harbor hawk hazel hedge heron hill honey hornet island ivory jacket jade
    jaguar jasmine juniper kayak kettle kite koala lagoon lantern laurel lava lemon lily linen lion lizard
    lobster lotus lynx magnet mango maple marble meadow melon meteor mint mirror monkey moose moss moth nectar
    nickel nutmeg oak oasis ocean olive onion opal orange orchid otter owl oyster paddle palm panda panther
    paper parrot peach pearl pebble pepper piano pigeon pine planet plum polar pond poppy prairie pumpkin
    quartz rabbit radish raven reef ribbon river robin rocket rose ruby saddle saffron salmon sand sapphire
    scarlet shark silk silver spider spruce squid star stone storm sugar summer swan temple thorn thunder
    tiger topaz tulip tundra turtle valley velvet violet violin walnut whale willow winter wolf yellow zebra
    zinc
"""
KEYS: tuple[str, ...] = tuple(_KEY_WORDS.split())
NAMES: tuple[str, ...] = ("Ada", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS: tuple[str, ...] = ("apples", "books", "cards", "coins", "cups", "pens", "shells", "stamps")

RECORD = "remember {key}={value};\n"
QUERY = "recall {key}="
ANSWER_END = ";\n"

NO_LOSS = 0.0
TEXT_LOSS = 1.0
ANSWER_LOSS = 6.0


@dataclass(frozen=True)
class Span:
    """A piece of training text and the weight of its tokens in the loss."""

    text: str
    weight: float


@dataclass(frozen=True)
class Prompt:
    """A prompt, the text a model that used its context continues with, and how far it had to look.

    `distance` counts tokens between the value in the record and the end of the prompt.
    """

    text: str
    answer: str
    distance: int


class Filler:
    """Ordinary text cut at line starts, so that a piece never begins inside a word."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._starts = [match.end() for match in re.finditer(r"\n(?=\S)", text)] or [0]

    def piece(self, rng: Random, chars: int) -> str:
        """About `chars` characters of whole lines, ending in a newline."""
        latest = bisect.bisect_right(self._starts, max(0, len(self.text) - chars - 1))
        start = self._starts[rng.randrange(max(1, latest))]
        end = self.text.find("\n", start + max(1, chars) - 1)
        return self.text[start:end] + "\n" if end >= 0 else self.text[start:] + "\n"


def random_value(rng: Random) -> str:
    """Three to five digits, every length equally likely."""
    digits = rng.randint(3, 5)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def recall_spans(rng: Random, filler: Filler, *, keys: int, filler_rate: float, filler_chars: int) -> Iterator[Span]:
    """Endless stream of records, queries and ordinary text.

    Half of the queries ask for the key that was not mentioned for the longest time, because
    a uniformly drawn key is usually copied from its last query instead of its record.
    Values of records are noise, so they carry no loss.
    """
    waiting = rng.sample(KEYS, keys)
    values: dict[str, str] = {}  # insertion order is the order of last mention
    while True:
        if rng.random() < filler_rate:
            yield Span(filler.piece(rng, rng.randint(1, 2 * filler_chars)), TEXT_LOSS)
        elif waiting and (not values or rng.random() < 0.5):
            key = waiting.pop()
            values[key] = random_value(rng)
            yield Span(RECORD.format(key=key, value=values[key]), NO_LOSS)
        else:
            key = next(iter(values)) if rng.random() < 0.5 else rng.choice(list(values))
            value = values.pop(key)
            values[key] = value
            yield Span(QUERY.format(key=key), NO_LOSS)
            yield Span(value + ANSWER_END, ANSWER_LOSS)


def recall_prompt(rng: Random, tokenizer: Any, filler: Filler, *, distance: int, records: int = 16) -> Prompt:
    """One query whose record lies about `distance` tokens back, among `records` records.

    The other records are spread over the whole prompt, before and behind the one asked for.
    """
    keys = rng.sample(KEYS, records)
    lines = {key: random_value(rng) for key in keys}
    target = keys[0]
    before = rng.randint(0, min(3, records - 1))
    head = _spread(rng, tokenizer, filler, [(k, lines[k]) for k in keys[1 : 1 + before]], 60)
    query = QUERY.format(key=target)
    room = distance - _count(tokenizer, query)
    tail = _spread(rng, tokenizer, filler, [(k, lines[k]) for k in keys[1 + before :]], room)
    record = RECORD.format(key=target, value=lines[target])
    actual = _count(tokenizer, tail + query)
    return Prompt(head + record + tail + query, lines[target] + ANSWER_END, actual)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _spread(rng: Random, tokenizer: Any, filler: Filler, records: list[tuple[str, str]], tokens: int) -> str:
    """As many of `records` as fit, spread over about `tokens` tokens of filler text."""
    texts = [RECORD.format(key=key, value=value) for key, value in records]
    while texts and sum(_count(tokenizer, text) for text in texts) > tokens:
        texts.pop()
    room = tokens - sum(_count(tokenizer, text) for text in texts)
    gaps = len(texts) + 1
    cuts = [room * index // gaps for index in range(gaps + 1)]
    parts = []
    for index in range(gaps):
        parts.append(_filler_of(rng, tokenizer, filler, cuts[index + 1] - cuts[index]))
        parts.extend(texts[index : index + 1])
    return "".join(parts)


def _filler_of(rng: Random, tokenizer: Any, filler: Filler, tokens: int) -> str:
    """About `tokens` tokens of filler: a long enough piece, its tokens cut to length."""
    if tokens < 2:
        return ""
    ids = tokenizer.encode(filler.piece(rng, 8 * tokens), add_special_tokens=False)
    return tokenizer.decode(ids[: tokens - 1]) + "\n"


def word_problem(rng: Random) -> tuple[str, str]:
    """A question with one or two steps over numbers below 40, and its worked answer."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(2, 20)
    story = f"{name} has {total} {thing}."
    steps = []
    for _ in range(rng.randint(1, 2)):
        gain = total < 3 or rng.random() < 0.5
        amount = rng.randint(1, 10 if gain else min(10, total - 1))
        result = total + amount if gain else total - amount
        story += f" {name} {'finds' if gain else 'loses'} {amount} {thing}."
        steps.append(f"{total} {'+' if gain else '-'} {amount} = {result}.")
        total = result
    question = f"Question: {story} How many {thing} does {name} have?\nAnswer:"
    return question, f" {' '.join(steps)} The answer is {total}.\n"


def arithmetic_spans(rng: Random, filler: Filler, *, filler_chars: int) -> Iterator[Span]:
    """Endless stream of worked problems; a piece of ordinary text follows every fourth or so."""
    while True:
        question, answer = word_problem(rng)
        yield Span(question, 0.1 * TEXT_LOSS)
        yield Span(answer, 0.5 * ANSWER_LOSS)
        if rng.random() < 0.25:
            yield Span(filler.piece(rng, rng.randint(1, 2 * filler_chars)), TEXT_LOSS)


def arithmetic_prompt(rng: Random, tokenizer: Any, filler: Filler, *, shots: int = 4, distance: int = 0) -> Prompt:
    """Worked examples in front, about `distance` tokens of ordinary text, then one question."""
    examples = "".join("".join(word_problem(rng)) for _ in range(shots))
    question, answer = word_problem(rng)
    between = _filler_of(rng, tokenizer, filler, distance)
    tail = between + question
    return Prompt(examples + tail, answer, _count(tokenizer, tail))
