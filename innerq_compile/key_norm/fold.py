"""``innerq_compile.fold_key_norm``: puts the pass of that name to work on a model, a graph or an exported program.

Folding changes parameters and no output, so the result is an ordinary model: ``save_pretrained`` saves it and people
without this package load it. ``config.innerq_key_norm`` tells an :class:`~innerq_compile.InnerQCache` that keys arrive
normalized already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tabulate import tabulate
from torch import fx, nn
from torch.export import ExportedProgram, export

from innerq_compile.cache.live_caches import new_weights, weights_changed, weights_of
from innerq_compile.cache.mark import check_fingerprint, fingerprint, mark_of, set_mark
from innerq_compile.compat.hf_transformers import attn_implementation, compiled_call, set_compiled_call
from innerq_compile.key_norm.calibration import WINDOW, token_windows
from innerq_compile.passes.graph import value_of
from innerq_compile.passes.key_norm.fold_key_norm import FoldedKeyNorm
from innerq_compile.passes.key_norm.fold_key_norm import fold_key_norm as fold_in_graph
from innerq_compile.passes.key_norm.key_factors import FactorSettings
from innerq_compile.passes.key_norm.trace_projections import FoldRefused
from innerq_compile.passes.key_norm.traced_graph import TracedGraph

FACTORS_FILE = "innerq_key_norm.safetensors"


@dataclasses.dataclass(frozen=True)
class KeyNormFold:
    """A key norm that was folded in place.

    Attributes:
        factors: Module path of each attention -> the factor of its key channels, float64 [KV heads, head_dim].
        error, budget: Largest relative change of the outputs on the calibration input, and what was allowed.
        settings: Which factor was folded.
        originals: Names of the changed parameters -> their former values.
    """

    factors: Mapping[str, torch.Tensor]
    error: float
    budget: float
    settings: FactorSettings
    originals: Mapping[str, torch.Tensor]
    _undo: Callable[[], None]

    def restore(self) -> None:
        """Puts the former parameters back, bit for bit, whatever happened to them since.

        A cache that was filled with the folded ones refuses to be used; one from before the fold is right again.
        """
        self._undo()

    def save(self, folder: str | Path) -> Path:
        """Writes the factors beside a saved model; ``fold_key_norm(..., factors=folder)`` applies them again."""
        path = Path(folder) / FACTORS_FILE
        metadata = {"settings": dataclasses.asdict(self.settings), "fingerprint": fingerprint(self.originals)}
        save_file(
            {name: factor.float().contiguous() for name, factor in self.factors.items()},
            path,
            {name: json.dumps(value) for name, value in metadata.items()},
        )
        return path

    def __str__(self) -> str:
        """A table of the layers below one line on the outputs."""
        rows = [
            (path, *factor.shape, f"{float(factor.min()):.3g}", f"{float(factor.max()):.3g}")
            for path, factor in self.factors.items()
        ]
        head = f"key norm folded into {len(self.originals)} parameters; outputs changed by {self.error:.1e}"
        table = tabulate(rows, headers=["layer", "KV heads", "head_dim", "smallest", "largest factor"])
        return f"{head} of their largest (allowed: {self.budget:.1e})\n{table}"


def fold_key_norm(
    model: nn.Module | ExportedProgram,
    calibration: Any,
    *,
    statistic: str = FactorSettings.statistic,
    strength: float = FactorSettings.strength,
    query_strength: float = FactorSettings.query_strength,
    power_of_two: bool = False,
    off_below: float = 0.0,
    factors: Mapping[str, torch.Tensor] | str | Path | None = None,
    progress: bool = True,
) -> KeyNormFold:
    """Folds the per-channel key norm into the projections in front of every attention, in place.

    Works on the captured graph, whatever the model's class. All attentions are folded or none. An ``InnerQCache`` of
    this model that holds tokens refuses to be used from then on: its keys fit the former parameters. Nobody tells
    transformers' own caches, so start new ones.

    Args:
        model: A causal language model, a ``GraphModule`` with its parameters as attributes, or an exported program.
        calibration: Tokens: a tensor of ids [T] or [B, T], a tokenizer's output, a list of them, or a ``DataLoader``.
            For a graph or a program: a list of its input tuples.
        statistic, strength, query_strength, power_of_two, off_below: Which factor, see
            :class:`~innerq_compile.passes.key_norm.key_factors.FactorSettings`. The published one is ``"max"``, 0.5, 0.
        factors: Factors by module path, or a folder where :meth:`KeyNormFold.save` left them: used instead of
            measured ones.
        progress: Shows a bar while keys are measured.

    Returns:
        A handle that restores the parameters bit for bit.

    Raises:
        FoldRefused: A ``ValueError``. Names what cannot be folded and why; the model is untouched.
        ValueError: A setting out of range, calibration without tokens, or factors that belong to another model.
    """
    settings = FactorSettings(statistic, strength, query_strength, power_of_two, off_below)
    if isinstance(model, ExportedProgram | fx.GraphModule):
        traced = (
            TracedGraph.from_graph(model) if isinstance(model, fx.GraphModule) else TracedGraph.from_exported(model)
        )
        batches = _input_tuples(traced, calibration)
    else:
        model = getattr(model, "_orig_mod", model)
        _check_foldable(model)
        traced, batches = _capture(model, calibration)
    known = _known_factors(traced, factors)
    result = fold_in_graph(traced, batches, settings, factors=known, progress=progress)
    put = _replace_state(model) if isinstance(model, ExportedProgram) else _overwrite
    originals, undo = put(traced, result)
    handle = KeyNormFold(
        dict(zip(result.paths, result.factors, strict=True)), result.error, result.budget, settings, originals, undo
    )
    return _mark(model, handle, traced, result) if hasattr(model, "config") else handle


def _input_tuples(traced: TracedGraph, calibration: Any) -> list[dict[fx.Node, Any]]:
    tensors = [node for node in traced.inputs if isinstance(value_of(node), torch.Tensor)]  # flags are baked in
    for inputs in calibration:
        if not isinstance(inputs, tuple) or len(inputs) != len(tensors):
            raise ValueError(f"calibration of a graph must be a list of tuples of its {len(tensors)} input tensors")
    return [dict(zip(tensors, inputs, strict=True)) for inputs in calibration]


def _check_foldable(model: nn.Module) -> None:
    if hasattr(model, "config") and mark_of(model.config) is not None:
        raise FoldRefused("the key norm of this model is folded already")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            kind = type(parameter) if type(parameter) is not nn.Parameter else type(parameter.data)
            raise FoldRefused(f"{name} is a {kind.__name__}: quantized weights and shards cannot be folded")
        if parameter.is_meta:
            raise FoldRefused(f"{name} is on the meta device: load the weights first")


def _capture(model: nn.Module, calibration: Any) -> tuple[TracedGraph, list[dict[fx.Node, Any]]]:
    """The graph of one call without a cache, and the calibration windows as its inputs."""
    config = getattr(model, "config", None)
    longest = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    device = next(model.parameters()).device
    windows = [window.to(device) for window in token_windows(calibration, longest)]
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with _as_plain_forward(model), torch.no_grad():
        try:
            program = export(model, (), {"input_ids": windows[0], **extra}, strict=False)
        except Exception as error:  # whatever a model does that torch.export cannot follow
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise FoldRefused(f"torch.export cannot capture the model: {first_line}") from error
    traced = TracedGraph.from_exported(program, model)
    return traced, _input_tuples(traced, [(window,) for window in windows])


@contextlib.contextmanager
def _as_plain_forward(model: nn.Module) -> Iterator[None]:
    """For a while: evaluation mode, nothing compiled, and attention as one op, whatever the model was loaded with."""
    training, compiled = model.training, compiled_call(model)
    attention = attn_implementation(model)
    try:
        model.eval()
        set_compiled_call(model, None)
        if attention not in (None, "sdpa"):
            with contextlib.suppress(ValueError):  # a model without sdpa: the pass will find no attention and say so
                model.set_attn_implementation("sdpa")  # type: ignore[operator]
        yield
    finally:
        model.train(training)
        set_compiled_call(model, compiled)
        if attention not in (None, "sdpa"):
            model.set_attn_implementation(attention)  # type: ignore[operator]


def _known_factors(
    traced: TracedGraph, factors: Mapping[str, torch.Tensor] | str | Path | None
) -> Mapping[str, torch.Tensor] | None:
    if not isinstance(factors, str | Path):
        return factors
    with safe_open(Path(factors) / FACTORS_FILE, "pt") as file:
        recorded = json.loads(file.metadata()["fingerprint"])
        check_fingerprint(recorded, {name: traced.tensors[node] for node, name in traced.names.items()})
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping


def _overwrite(traced: TracedGraph, result: FoldedKeyNorm) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """New values in the same tensors. Returns the former values by name, and what puts them back."""
    parameters = {traced.names[node]: traced.tensors[node] for node in result.tensors}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for node, value in result.tensors.items():
        traced.tensors[node].data.copy_(value)

    def undo() -> None:
        for name, parameter in parameters.items():
            parameter.data.copy_(before[name])

    return before, undo


def _replace_state(
    program: ExportedProgram,
) -> Callable[[TracedGraph, FoldedKeyNorm], tuple[dict[str, torch.Tensor], Callable[[], None]]]:
    """New entries instead of new values: the program's tensors are still those of the model it was exported from."""

    def put(traced: TracedGraph, result: FoldedKeyNorm) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        state = program.state_dict
        before = {traced.names[node]: state[traced.names[node]] for node in result.tensors}
        for node, value in result.tensors.items():
            name = traced.names[node]
            state[name] = nn.Parameter(value, requires_grad=before[name].requires_grad)
        return before, lambda: state.update(before)

    return put


def _mark(model: Any, handle: KeyNormFold, traced: TracedGraph, result: FoldedKeyNorm) -> KeyNormFold:
    changed = {traced.names[node]: tensor for node, tensor in result.tensors.items()}
    set_mark(model.config, {**dataclasses.asdict(handle.settings), "fingerprint": fingerprint(changed)})
    before = weights_of(model.config)
    weights_changed(model.config, "fold_key_norm()", now=new_weights())

    def undo() -> None:
        handle._undo()
        set_mark(model.config, None)
        weights_changed(model.config, "restore()", now=before)

    return dataclasses.replace(handle, _undo=undo)
