"""Attention that a model writes out, ``softmax(q K^T * scale + mask) V``, read as the one call it stands for.

transformers' ``attn_implementation="eager"``. Every step between the keys and the result must be one of those below and
have one user, so that nothing but the result is lost when a single op takes their place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from innerq_compile.passes.graph import ATTENTION, AttentionCall, op_name, same_shape, users_of, value_of
from innerq_compile.passes.report import REFUSED

_CASTS = frozenset({"bfloat16", "contiguous", "double", "float", "half", "to", "type", "type_as"})


class Mismatch(Exception):  # noqa: N818  no error: how a check deep in a walk says why the walk stops
    """Something that does not mean what a fused attention would compute; ``status`` is one of a report's."""

    def __init__(self, reason: str, status: str = REFUSED) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention of a graph.

    Attributes:
        call: Its arguments.
        result: The node that holds its result.
        steps: Nodes between keys and result, in graph order; dead once the result is computed otherwise.
    """

    call: AttentionCall
    result: fx.Node
    steps: tuple[fx.Node, ...] = ()


def read_spelled_out(key: fx.Node) -> Attention | None:
    """The attention whose keys are ``key`` [B, H, N, D], or ``None`` where its user does not even transpose it.

    Raises:
        Mismatch: The steps that follow are no plain attention; says which of them, and what it does.
    """
    transposed = only_user(key, "keys")
    if not _swaps_last_axes(transposed):
        return None
    scores = only_user(transposed, "keys")
    if op_name(scores) != "matmul" or scores.args[1] is not transposed:
        raise Mismatch(f"{op_name(scores)} of the transposed keys is no product of queries and keys")
    steps = [transposed, scores]
    scale, mask = _read_scores(steps)
    dropout_p = _read_weights(steps)
    result = steps.pop()
    call = AttentionCall(
        query=scores.args[0],  # type: ignore[arg-type]
        key=key,
        value=result.args[1],  # type: ignore[arg-type]
        attn_mask=mask,
        dropout_p=dropout_p,
        scale=scale,
    )
    return Attention(call, result, tuple(steps))


def _read_scores(steps: list[fx.Node]) -> tuple[float, Any]:
    """Extends ``steps`` from the product of queries and keys to the softmax; gives the scale and the additive mask."""
    scale, mask = 1.0, None
    while True:
        scores = steps[-1]
        node = only_user(scores, "attention scores")
        # Nobody else sees the scores, so working in place makes no difference.
        name, other = op_name(node).removesuffix("_"), _other_operand(node, scores)
        if name == "softmax":
            if _argument(node, 1, "dim") not in {-1, value_of(node).dim() - 1}:
                raise Mismatch("the softmax does not run over the keys")
        elif name in {"mul", "div"} and isinstance(other, int | float) and mask is None and not node.kwargs:
            if name == "div" and node.args[0] is not scores:
                raise Mismatch("a number is divided by the attention scores")
            scale = scale * other if name == "mul" else scale / other
        elif name == "add" and isinstance(other, fx.Node) and mask is None and not node.kwargs:
            if value_of(other) is not None and not value_of(other).is_floating_point():
                raise Mismatch(f"a mask of {value_of(other).dtype} is added to the attention scores")
            mask = other
        elif not _only_casts(node):
            raise Mismatch(_why_not_between(name))
        steps.append(node)
        if name == "softmax":
            return scale, mask


def _why_not_between(name: str) -> str:
    if name == "tanh":
        return f"logit soft-capping: tanh of the attention scores, which {ATTENTION} cannot express"
    if name == "cat":
        return "learned sink logits: cat adds columns to the attention scores before the softmax"
    return f"{name} stands between the attention scores and the softmax"


def _read_weights(steps: list[fx.Node]) -> float:
    """Extends ``steps`` from the softmax to the product with the values; gives the dropout probability."""
    dropout_p = 0.0
    while True:
        weights = steps[-1]
        node = only_user(weights, "attention weights")
        name = op_name(node)
        if name == "dropout":
            dropout_p = _argument(node, 1, "p", 0.5) if _argument(node, 2, "training", True) else 0.0
        elif name == "matmul" and node.args[0] is weights and isinstance(node.args[1], fx.Node):
            steps.append(node)
            return dropout_p
        elif not _only_casts(node):
            raise Mismatch(f"{name} stands between the attention weights and the values")
        steps.append(node)


def only_user(node: fx.Node, what: str) -> fx.Node:
    """The one user of a node.

    Raises:
        Mismatch: It has none or several; the reason calls the node ``what``.
    """
    users = users_of(node)
    if len(users) == 1:
        return users[0]
    others = ", ".join(map(op_name, users)) or "none"
    hint = " (output_attentions)" if what == "attention weights" else ""
    raise Mismatch(f"{what} have {'a second user' if users else 'no user'}: {others}{hint}")


def _other_operand(node: fx.Node, known: fx.Node) -> Any:
    """The second operand of a binary operation, whichever side it stands on; ``None`` for everything else."""
    operands = node.args[:2]
    if len(operands) < 2 or known not in operands:
        return None
    return operands[1] if operands[0] is known else operands[0]


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _swaps_last_axes(node: fx.Node) -> bool:
    axes = tuple(node.args[1:])
    return op_name(node) == "transpose" and axes in {(2, 3), (3, 2), (-1, -2), (-2, -1)}


def _only_casts(node: fx.Node) -> bool:
    """Whether a node hands its floating-point input on, in another floating-point dtype at most."""
    source, result = value_of(node.args[0]) if node.args else None, value_of(node)
    if op_name(node) not in _CASTS or not isinstance(source, torch.Tensor):
        return False
    return isinstance(result, torch.Tensor) and result.is_floating_point() and same_shape(result.shape, source.shape)
