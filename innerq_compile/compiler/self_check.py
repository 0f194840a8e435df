"""A model decodes a few tokens from a cache like the one that ``enable`` will give it, and must compute the same.

Some models do not fit a cache of fixed length and nothing says so: they raise from the inside, or read the length of
the buffer as the number of tokens and compute something else. What a model's code does with a cache shows when it runs.
Before anything is quantized, :class:`~innerq_compile.InnerQCache` returns keys and values bit for bit, so the logits
may differ from those without a cache by rounding only.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from innerq_compile.cache.layer import told_nothing
from innerq_compile.refused import Refused, first_line

logger = logging.getLogger(__name__)

_CACHE_NAMES = {"past_key_values", "past_key_value", "layer_past"}

PROMPT, STEPS = 6, 2
"""Too few tokens for any settings to quantize one."""
SCORE = 64
"""Attention scores are taken to be smaller than this: a rounding of such a score moves its weight by so many more."""
CAPACITY = 512
"""The least that ``enable`` gives a cache. The fault shows once a buffer is longer than what a layer may see."""
TRIES = 3
"""Prompts that must all disagree. In a mixture of experts one rounding may send a token to another expert."""


def self_check(model: PreTrainedModel, make_cache: Callable[..., Cache]) -> None:
    """Compares a few decode steps over ``make_cache()`` with the same model's forward without a cache, uncompiled.

    Costs about five forwards of a few tokens. Leaves the model, its mode and the global random generators as they
    are. A model whose weights are elsewhere (meta, offloaded, sharded) is not run, and one that fails by itself is not
    judged; both are logged.

    The budget is measured: twice what the logits move by when the output of each attention layer moves by as much as
    rounding moves it (one rounding in the model's dtype, and those of its scores in float32), plus one rounding of the
    largest logit. Routers and deep models make of that what they make of a real one.

    Args:
        model: On the device where it will generate.
        make_cache: Takes ``max_cache_len`` and returns an empty cache.

    Raises:
        Refused: Naming the layer, where one is to blame, and the two figures or the error.
    """
    elsewhere = _why_not_run(model)
    if elsewhere:
        logger.info("enable() did not check %s: %s", type(model).__name__, elsewhere)
        return
    with _undisturbed(model):
        _compare(model, lambda: make_cache(max_cache_len=CAPACITY))


def _compare(model: PreTrainedModel, make_cache: Callable[[], Cache]) -> None:
    generator = torch.Generator().manual_seed(0)
    errors: list[float] = []
    budgets: list[float] = []
    for _ in range(TRIES):
        ids = _random_tokens(model, generator).to(model.device)
        try:
            plain = _logits(model, ids)
            with _rounding_noise(model, generator):
                noisy = _logits(model, ids)
            ours = _decode(model, ids, make_cache())
        except Exception as error:
            if _raises_over_any_cache(model, ids):  # only generate() knows how to call this model
                return _compare_generation(model, ids, make_cache)
            raise _raised(model, error) from error
        errors.append(_distance(ours, plain))
        budgets.append(_budget(model, plain, noisy))
        if not torch.isfinite(plain).all() or min(errors) <= max(budgets):
            return None
    usual = _decode(model, ids, _usual_cache(model))
    if errors[-1] <= 2 * _distance(usual, plain):  # to this model, a cache of any kind is something else than none
        return None
    reason = (
        f"computes something else over a cache of fixed length: its logits are off by {min(errors):.2g} where rounding "
        f"explains {max(budgets):.2g}"
    )
    raise Refused(type(model).__name__, reason, _first_different(model, ids, generator, make_cache))


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).abs().max())


def _budget(model: PreTrainedModel, plain: torch.Tensor, noisy: torch.Tensor) -> float:
    return 2 * _distance(noisy, plain) + torch.finfo(model.dtype).eps * float(plain.abs().max())


def _raises_over_any_cache(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    try:
        _logits(model, ids)
        _decode(model, ids, _usual_cache(model))
    except Exception:  # noqa: BLE001  the model's own, whatever it is
        return True
    return False


def _compare_generation(model: PreTrainedModel, ids: torch.Tensor, make_cache: Callable[[], Cache]) -> None:
    """All that can be said of a model that cannot be called by hand: whether ``generate()`` raises over our cache."""
    try:
        _generate(model, ids, _usual_cache(model))
    except Exception as error:  # noqa: BLE001  the model's own, whatever it is
        name = type(model).__name__
        logger.info("enable() could not check %s: without our cache it raises %s", name, first_line(error))
        return
    try:
        _generate(model, ids, make_cache())
    except Exception as error:
        raise _raised(model, error) from error


def _raised(model: PreTrainedModel, error: Exception) -> Refused:
    reason = f"raises over a cache of fixed length: {first_line(error)}"
    return Refused(type(model).__name__, reason, _blamed(model, error))


def _usual_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _generate(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> None:
    mask = torch.ones_like(ids)
    limits = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "num_beams": 1, "do_sample": False}
    model.generate(ids, attention_mask=mask, past_key_values=cache, disable_compile=True, **limits)


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """float64 logits of the last STEPS tokens, without a cache: [STEPS, V]."""
    return _call(model, ids, use_cache=False)[0, -STEPS:].double()


def _decode(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """The same logits, each token decoded by itself after a prefill of the others."""
    _call(model, ids[:, :PROMPT], past_key_values=cache, use_cache=True)
    rows = []
    for end in range(PROMPT + 1, PROMPT + STEPS + 1):
        rows.append(_call(model, ids[:, :end], end - 1, past_key_values=cache, use_cache=True)[0, -1])
    return torch.stack(rows).double()


def _call(model: PreTrainedModel, ids: torch.Tensor, begin: int = 0, **kwargs: Any) -> torch.Tensor:
    """Logits of the tokens from ``begin`` on, called as ``generate()`` calls: with a mask, and positions if taken."""
    parameters = inspect.signature(model.forward).parameters
    offered = {
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(begin, ids.shape[1], device=ids.device)[None],
        "return_dict": True,
        **kwargs,
    }
    taken = {name: value for name, value in offered.items() if name in parameters}
    # Not model(...), which would go through what a user may have compiled.
    return model.forward(ids[:, begin:], **taken).logits


def _random_tokens(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    """Token ids [1, PROMPT + STEPS], none of which stands for something else (an image, the end, padding)."""
    config = model.config
    names = [*vars(config).items(), *vars(config.get_text_config(decoder=True)).items()]
    special = {value for name, value in names if name.endswith(("_token_id", "_token_index"))}
    vocab_size = model.get_input_embeddings().weight.shape[0]
    candidates = torch.randint(0, vocab_size, (64,), generator=generator).tolist()
    ordinary = [token for token in candidates if token not in special] or candidates
    return torch.tensor([list(itertools.islice(itertools.cycle(ordinary), PROMPT + STEPS))])


@contextlib.contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, no dropout, no warning about what a user did not do; random generators and modes put back."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type not in ("cpu", "meta") else []
    kind = model.device.type if devices else "cuda"
    with torch.no_grad(), told_nothing(), torch.random.fork_rng(devices=devices, device_type=kind):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _why_not_run(model: PreTrainedModel) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return f"{name} is on the meta device or offloaded"
        if hasattr(parameter, "placements"):
            return f"{name} is a shard"
    return None


def _blamed(model: PreTrainedModel, error: BaseException) -> str:
    """Path of the innermost module of the model whose forward the error came through."""
    paths = {id(module): path for path, module in model.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        module = frame.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            found = paths.get(id(module), found)
        frame = frame.tb_next
    return found


def _attention_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path -> the innermost modules whose forward takes a cache."""
    taking = {
        path: module
        for path, module in model.named_modules()
        if not _CACHE_NAMES.isdisjoint(inspect.signature(module.forward).parameters)
    }
    return {
        path: m
        for path, m in taking.items()
        if not any(other.startswith(f"{path}.") or not path for other in taking if other != path)
    }


@contextlib.contextmanager
def _hooked(layers: dict[str, nn.Module], change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Shows what each layer gives, the first of its tensors, to ``change``, and puts what that returns in its place."""

    def hook(path: str, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        changed = change(path, first) if isinstance(first, torch.Tensor) else None
        if changed is None:
            return None
        return (changed, *rest) if isinstance(output, tuple) else changed

    handles = [
        module.register_forward_hook(lambda _module, _args, output, path=path: hook(path, output))
        for path, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding_noise(model: PreTrainedModel, generator: torch.Generator) -> contextlib.AbstractContextManager[None]:
    """Moves what each attention layer gives by as much as another order of its sums may."""
    size = torch.finfo(model.dtype).eps + SCORE * torch.finfo(torch.float32).eps

    def move(path: str, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return (output.double() * (1 + size * signs)).to(output.dtype)

    return _hooked(_attention_layers(model), move)


def _first_different(
    model: PreTrainedModel, ids: torch.Tensor, generator: torch.Generator, make_cache: Callable[[], Cache]
) -> str:
    """Path of the first attention layer that gives something else for the last token."""
    layers, outputs = _attention_layers(model), {}

    def keep(path: str, output: torch.Tensor) -> None:
        if output.dim() > 1:
            outputs[path] = output[..., -1, :].double()

    runs = []
    for context, run in (
        (contextlib.nullcontext(), lambda: _logits(model, ids)),
        (_rounding_noise(model, generator), lambda: _logits(model, ids)),
        (contextlib.nullcontext(), lambda: _decode(model, ids, make_cache())),
    ):
        with context, _hooked(layers, keep):  # in this order a layer's own noise is seen
            run()
        runs.append(dict(outputs))
    plain, noisy, ours = runs
    for path, expected in plain.items():
        if path in ours and not _distance(ours[path], expected) <= _budget(model, expected, noisy[path]):
            return path
    return ""
