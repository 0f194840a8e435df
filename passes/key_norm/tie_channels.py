"""Groups channels and parameter slots that must share one factor, over all attentions of a model at once."""

from __future__ import annotations

import dataclasses

import torch

from innerq_compile.passes.key_norm.trace_projections import Channels, FoldRefused, ScaledParameter
from innerq_compile.passes.key_norm.traced_graph import TracedGraph

KEY, QUERY = -1, 1
"""Role of a parameter slot: a key's is divided by the factor of its group, a query's multiplied."""

Memory = tuple[int, torch.Size, tuple[int, ...]]


def memory_of(tensor: torch.Tensor) -> Memory:
    """What identifies a tensor, whatever it is called: address, shape, strides."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class Groups:
    """Disjoint sets over the numbers 0 .. n-1 that only ever grow together."""

    def __init__(self) -> None:
        self.parent: list[int] = []

    def add(self, count: int) -> int:
        """Adds ``count`` sets of one; the number of the first."""
        begin = len(self.parent)
        self.parent.extend(range(begin, begin + count))
        return begin

    def find(self, item: int) -> int:
        """The representative of a set."""
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def union(self, a: int, b: int) -> None:
        """Makes one set of two."""
        self.parent[self.find(a)] = self.find(b)


@dataclasses.dataclass(frozen=True)
class ParameterSlots:
    """The slots of one tensor: their numbers in the groups, where they lie, and what a factor does to them."""

    name: str
    tensor: torch.Tensor
    axis: int | None
    offset: float
    first: int
    count: int


class TiedChannels:
    """Channels [H, D] of every site, tied to each other through the parameters that produce them."""

    def __init__(self, traced: TracedGraph) -> None:
        self.traced = traced
        self.groups = Groups()
        self.parameters: dict[Memory, ParameterSlots] = {}
        self.roles: dict[int, set[int]] = {}
        self.sites: list[tuple[int, tuple[int, int]]] = []
        self._fed: dict[int, set[int]] = {}

    def add_site(
        self,
        key: Channels,
        key_reach: list[torch.Tensor],
        query: Channels,
        query_reach: list[torch.Tensor],
        head_dim: int,
    ) -> None:
        """Adds an attention; ``*_reach`` is what :func:`probe_channels` found for its keys and for its queries."""
        num_kv_channels, num_q_channels = key_reach[0].shape[0], query_reach[0].shape[0]
        first = self.groups.add(num_kv_channels)
        self.sites.append((first, (num_kv_channels // head_dim, head_dim)))
        channel = torch.arange(num_q_channels)
        q_per_kv = num_q_channels // num_kv_channels
        shared = channel // head_dim // q_per_kv * head_dim + channel % head_dim
        self._tie(key, key_reach, first + torch.arange(num_kv_channels), KEY)
        self._tie(query, query_reach, first + shared, QUERY)

    def _tie(self, channels: Channels, reach: list[torch.Tensor], numbers: torch.Tensor, role: int) -> None:
        for scaling, matrix in zip(channels.scalings, reach, strict=True):
            owners = [self._slots(parameter, scaling.num_slots) for parameter in scaling.parameters]
            for row, slot in matrix.nonzero().tolist():
                channel = int(numbers[row])
                self._fed.setdefault(channel, set()).add(role)
                for owner in owners:
                    self.groups.union(channel, owner.first + slot)
                    self.roles.setdefault(owner.first + slot, set()).add(role)

    def _slots(self, parameter: ScaledParameter, count: int) -> ParameterSlots:
        tensor = self.traced.tensors[parameter.node]
        memory = memory_of(tensor)
        if memory not in self.parameters:
            name, first = self.traced.names[parameter.node], self.groups.add(count)
            self.parameters[memory] = ParameterSlots(name, tensor, parameter.axis, parameter.offset, first, count)
        known = self.parameters[memory]
        if (known.axis, known.offset, known.count) != (parameter.axis, parameter.offset, count):
            raise FoldRefused(f"{known.name} scales channels in two different ways")
        return known

    def fixed(self) -> dict[int, str]:
        """Groups whose factor must stay 1, with the reason."""
        fixed = {}
        for parameter in self.parameters.values():
            for slot in range(parameter.first, parameter.first + parameter.count):
                if len(self.roles.get(slot, ())) > 1:
                    fixed[self.groups.find(slot)] = f"{parameter.name} scales keys and queries alike"
        for first, (heads, head_dim) in self.sites:
            for channel in range(first, first + heads * head_dim):
                if len(self._fed.get(channel, ())) < 2:
                    fixed[self.groups.find(channel)] = "a channel of keys or queries is scaled by no parameter"
        return fixed

    def solve(self, wanted: list[torch.Tensor], fixed: dict[int, str]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """One factor per group: the largest that one of its channels wants, and 1 for the fixed ones.

        Args:
            wanted: Per site [H, D].
            fixed: Of :meth:`fixed`.

        Returns:
            Per site the factors [H, D], and the factor of every number of the groups; float64.
        """
        roots = torch.tensor([self.groups.find(item) for item in range(len(self.groups.parent))])
        largest = torch.zeros(len(roots), dtype=torch.float64)
        for (first, (heads, head_dim)), factors in zip(self.sites, wanted, strict=True):
            index = roots[first : first + heads * head_dim]
            largest.scatter_reduce_(0, index, factors.flatten().double().cpu(), "amax")
        largest[largest == 0] = 1.0  # groups without a channel: rows of values in a fused projection
        largest[list(fixed)] = 1.0
        factor = largest[roots]
        return [factor[first : first + heads * dim].view(heads, dim) for first, (heads, dim) in self.sites], factor

    def exponents(self) -> torch.Tensor:
        """-1 for every slot that is divided by its group's factor, 1 for every one multiplied, 0 for the rest."""
        exponents = torch.zeros(len(self.groups.parent), dtype=torch.float64)
        for slot, roles in self.roles.items():
            exponents[slot] = sum(roles)
        return exponents
