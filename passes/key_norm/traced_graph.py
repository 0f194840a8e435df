"""A captured graph together with the real tensors behind it, so that any part of it can be computed with numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

PARAMETER, ACTIVATION, FREE = "parameter", "activation", "free"
"""What a value depends on: on parameters alone; on parameters and inputs; on no parameter (positions, masks, RoPE)."""


@dataclasses.dataclass(frozen=True)
class TracedGraph:
    """A graph of torch functions or of ATen ops, and what its inputs hold.

    Attributes:
        gm: The graph; never changed here.
        tensors: Placeholder or ``get_attr`` node -> its tensor, for everything but the caller's inputs.
        names: The nodes among them that hold a parameter -> that parameter's name.
        inputs: Placeholders of the caller's inputs, in order.
        outputs: Nodes whose values the caller gets back (written-back buffers left out, where the graph says so).
    """

    gm: fx.GraphModule
    tensors: dict[fx.Node, Any]
    names: dict[fx.Node, str]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @staticmethod
    def from_exported(program: ExportedProgram, model: nn.Module | None = None) -> TracedGraph:
        """Reads a program of ``torch.export``, with its own state, or with the tensors of ``model`` it came from."""
        signature = program.graph_signature
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())} if model else {}
        held: dict[str, Any] = {**program.constants, **program.state_dict, **state}
        sources = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        tensors, names, inputs = {}, {}, []
        for node in program.graph.find_nodes(op="placeholder"):
            if node.name in sources:
                tensors[node] = held[sources[node.name]]
                if node.name in signature.inputs_to_parameters:
                    names[node] = sources[node.name]
            else:
                inputs.append(node)
        wanted = set(map(str, signature.user_outputs))
        outputs = tuple(node for node in program.graph.output_node().all_input_nodes if node.name in wanted)
        return TracedGraph(program.graph_module, tensors, names, tuple(inputs), outputs)

    @staticmethod
    def from_graph(gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None) -> TracedGraph:
        """Reads a graph whose parameters are its own attributes, or Dynamo's, which passes them as example inputs."""
        tensors: dict[fx.Node, Any] = {}
        names: dict[fx.Node, str] = {}
        inputs = []
        placeholders = gm.graph.find_nodes(op="placeholder")
        examples = example_inputs if example_inputs is not None else [None] * len(placeholders)
        for node, value in zip(placeholders, examples, strict=True):
            if isinstance(value, nn.Parameter):
                tensors[node], names[node] = value, node.name
            else:
                inputs.append(node)
        own = dict(gm.named_parameters(remove_duplicate=False))
        for node in gm.graph.find_nodes(op="get_attr"):
            if node.target in own:
                tensors[node], names[node] = own[str(node.target)], str(node.target)
        return TracedGraph(gm, tensors, names, tuple(inputs), tuple(gm.graph.output_node().all_input_nodes))

    def kinds(self) -> dict[fx.Node, str]:
        """``"parameter"``, ``"activation"`` or ``"free"`` for every node."""
        kinds: dict[fx.Node, str] = {}
        for node in self.gm.graph.nodes:
            sources = {kinds[source] for source in node.all_input_nodes}
            if node in self.names or sources == {PARAMETER}:
                kinds[node] = PARAMETER
            elif sources & {PARAMETER, ACTIVATION}:
                kinds[node] = ACTIVATION
            else:
                kinds[node] = FREE
        return kinds

    @torch.no_grad()
    def evaluate(self, wanted: Sequence[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
        """The values of ``wanted``, from the graph's own tensors and from ``given``, which replaces any node's value.

        Only what they need is computed, so an op that is there for its side effect (a cache write) does not run.
        """
        env = {**self.tensors, **given}
        needed: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in needed and node not in env:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        uses = Counter(source for node in needed for source in node.all_input_nodes)
        uses.update(wanted)
        interpreter = fx.Interpreter(self.gm)
        interpreter.env = env
        for node in self.gm.graph.nodes:
            if node in needed:
                env[node] = interpreter.run_node(node)
                for source in node.all_input_nodes:
                    uses[source] -= 1
                    if not uses[source]:
                        del env[source]
        return [env[node] for node in wanted]
