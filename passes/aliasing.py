"""Which values of a graph may share memory, who may write there, and so what may be moved past what.

The one rule for moving anything in a graph: :meth:`Memory.conflict` names what stands in the way between the two
places. It errs on the side of seeing a write. What an op does is read off its schema, torch's functions and methods by
the schemas of the ATen op of that name, and two fake tensors in one storage share memory whatever was said of the op
between them. What nobody describes may do anything to its arguments.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from innerq_compile.compat.pytorch import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of
from innerq_compile.passes.graph import value_of

_CASTS = frozenset(
    {"bfloat16", "bool", "byte", "char", "cpu", "cuda", "double", "float", "half", "int", "long", "short", "type"}
)
"""Methods of a tensor that are ``to`` under another name."""

_ITSELF = frozenset(
    {"_unsafe_view", "align_tensors", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "cartesian_prod"}
    | {"alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout", "feature_dropout"}
    | {"einsum", "meshgrid", "rrelu", "sum_to_size", "type_as", "unsafe_chunk", "unsafe_split", "__pos__", "pos"}
    | {"unsafe_split_with_sizes", "getitem", "__getitem__", "getattr"}
)
"""What may hand an argument, or a view of it, on without a word of it in its schema, or without a schema."""

_WRITES_UNSAID = frozenset({"batch_norm", "embedding", "embedding_bag", "instance_norm"})
"""Functions that write into an argument in some of their settings (running statistics, ``max_norm``)."""


_SIZES = frozenset({"dim", "is_contiguous", "is_floating_point", "numel", "size", "storage_offset", "stride"})


class Memory:
    """The memory behind the values of one graph. Nodes that are added to the graph later are read when they are met."""

    def __init__(self, graph: fx.Graph) -> None:
        self._parents: dict[Any, Any] = {}
        self._writes: dict[fx.Node, tuple[fx.Node, ...] | None] = {}
        for node in graph.nodes:
            self._read(node)

    def conflict(
        self,
        *,
        after: fx.Node,
        before: fx.Node,
        reads: Iterable[fx.Node] = (),
        writes: Iterable[fx.Node] = (),
        ignoring: Container[fx.Node] = (),
    ) -> fx.Node | None:
        """What forbids that something is done at ``before`` which the graph does at ``after``, or the other way round.

        Args:
            after, before: The two places; what stands strictly between them is looked at.
            reads, writes: Values that what is moved reads, and those that it writes into.
            ignoring: Nodes in between that are known not to mind.

        Returns:
            The first node in between that may write what is read or written, or read what is written; ``None`` where
            there is none and the move changes nothing. ``before`` itself if it does not stand behind ``after``.
        """
        written = {self._home(node) for node in writes}
        touched = written | {self._home(node) for node in reads}
        node = after.next
        while node is not before:
            if node.op == "root":  # a graph is a ring
                return before
            if node not in ignoring:
                self._read(node)
                targets = self._writes[node]
                if targets is None or touched & {self._home(target) for target in targets}:
                    return node
                if written & {self._home(source) for source in node.all_input_nodes} and not _only_looks(node):
                    return node
            node = node.next
        return None

    def _read(self, node: fx.Node) -> None:
        if node in self._writes:
            return
        self._writes[node], shared = _effect(node)
        for other in shared:
            self._join(node, other)
        for storage in _storages(value_of(node)):
            self._join(node, storage)
        if node.op == "get_attr":
            self._join(node, node.target)

    def _home(self, item: Any) -> Any:
        """One representative of everything that may share memory with ``item``."""
        while (parent := self._parents.get(item, item)) != item:
            self._parents[item] = self._parents.get(parent, parent)
            item = parent
        return item

    def _join(self, a: Any, b: Any) -> None:
        a, b = self._home(a), self._home(b)
        if a != b:
            self._parents[a] = b


def _effect(node: fx.Node) -> tuple[tuple[fx.Node, ...] | None, tuple[fx.Node, ...]]:
    """(arguments that a node may write into, arguments whose memory its result may share); ``None`` is everything."""
    if node.op == "call_module":
        return None, tuple(node.all_input_nodes)
    if node.op not in {"call_function", "call_method"}:
        return (), ()
    inputs = tuple(source for source in node.all_input_nodes if _may_hold_memory(source))
    if _overwrites_first(node):
        first = tuple(source for source in inputs[:1] if source is node.args[0])
        return first, first
    name, packet = _named(node)
    if isinstance(node.target, OpOverload):
        schemas = [schema_of(node.target)]
    elif packet is not None:
        schemas = [schema_of(getattr(packet, overload)) for overload in packet.overloads()]
    elif name in _ITSELF:
        schemas = []
    elif node.target in _PURE:
        return (), ()
    else:
        return inputs, inputs
    writes, shares = _said_by(schemas, node)
    if name in _ITSELF:
        shares |= set(inputs)
    if name in _WRITES_UNSAID or _works_in_place(node):
        writes |= set(inputs)
        shares |= set(inputs)
    return tuple(writes), tuple(shares)


def _said_by(schemas: Iterable[Any], node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """What schemas say of the arguments that a node passes, any of the schemas counting."""
    writes: set[fx.Node] = set()
    shares: set[fx.Node] = set()
    named: set[str] = {"input"}  # torch's own name for what schemas call self, the first argument
    for schema in schemas:
        for position, argument in enumerate(schema.arguments):
            named.add(argument.name)
            if argument.alias_info is None:
                continue
            passed = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if position == 0 and "input" in node.kwargs:
                passed = node.kwargs["input"]
            shares.update(_nodes_in(passed))
            if argument.alias_info.is_write:
                writes.update(_nodes_in(passed))
    for name, passed in node.kwargs.items():
        if name not in named or name == "out":
            writes.update(_nodes_in(passed))
            shares.update(_nodes_in(passed))
    return writes, shares


def _named(node: fx.Node) -> tuple[str, Any]:
    """The bare name of what a node calls, and the ATen op of that name if torch itself is what is called."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return schema_of(target).name.split("::")[-1], None
    if isinstance(target, OpOverloadPacket):
        return target.__name__, target
    if node.op == "call_method":
        name = "to" if target in _CASTS else str(target)
    elif _is_torchs(target):
        name = str(getattr(target, "__name__", ""))
    else:
        return "", None
    return name, getattr(torch.ops.aten, name, None) if name else None


def _is_torchs(target: Any) -> bool:
    """Whether a function is one of torch's or Python's own: a user's function called ``reshape`` may do anything."""
    if isinstance(target, HigherOrderOperator):
        return False
    owner = getattr(target, "__module__", None)
    return owner is None or owner in {"_operator", "builtins"} or owner.split(".")[0] == "torch"


def _overwrites_first(node: fx.Node) -> bool:
    """``x[...] = y``, ``x += y`` and the like, as functions of ``operator`` or as methods."""
    if node.op == "call_function" and getattr(node.target, "__module__", None) != "_operator":
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")).strip("_")
    return name == "setitem" or (name[:1] == "i" and (hasattr(operator, name[1:]) or hasattr(operator, name[1:] + "_")))


_PURE = frozenset(
    getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "invert", "abs")
    + ("and_", "or_", "xor", "lshift", "rshift", "lt", "le", "eq", "ne", "gt", "ge", "not_", "truth", "is_", "is_not")
)
"""Operators whose result is always new. (``+x`` is ``x`` itself.)"""


def _works_in_place(node: fx.Node) -> bool:
    """Whether a function of torch is asked, or may be asked, to overwrite its input."""
    if not inspect.isfunction(node.target):
        return False
    try:
        passed = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):
        return True
    return bool(passed.get("inplace", False))


def _only_looks(node: fx.Node) -> bool:
    """Whether a node reads no numbers: it asks for a size, or shows memory in another shape. Who reads that is met."""
    if _named(node)[0] in _SIZES:
        return True
    source = value_of(node.args[0]) if node.args else None
    here, there = set(_storages(value_of(node))), set(_storages(source))
    return bool(here) and here == there


def _may_hold_memory(node: fx.Node) -> bool:
    """``False`` for a node that is known to stand for numbers."""
    value = value_of(node)
    return not isinstance(value, int | float | bool | str | torch.SymInt | torch.SymFloat | torch.SymBool | torch.Size)


def _nodes_in(argument: Any) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return iter(found)


def _storages(value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, torch.Tensor):
        try:
            yield "storage", StorageWeakRef(value.untyped_storage()).cdata
        except NotImplementedError:  # a tensor without any, a sparse one
            return
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _storages(part)
