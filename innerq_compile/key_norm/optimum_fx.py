"""Our two rewrites as ``optimum.fx.optimization`` transformations, to be composed with optimum's own.

Needs optimum (``pip install optimum``); nothing else of this package does. Both work on a ``GraphModule`` as
torch.export or Dynamo makes it, with the parameters as attributes::

    composition = compose(FoldKeyNorm([(tokens,)]), FuseDecodeAttention())
    composition(program.module())
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import fx

from innerq_compile.key_norm.fold import fold_key_norm
from innerq_compile.passes.decode import run_passes

try:
    from optimum.fx.optimization import ReversibleTransformation
except ImportError as error:
    raise ImportError("innerq_compile.key_norm.optimum_fx needs optimum: pip install optimum") from error

_HANDLES, _GRAPHS = "innerq_key_norm_folds", "innerq_unfused_graphs"
"""Keys of ``GraphModule.meta``: what is needed to undo, latest last. It stays with the graph, not with the
transformation, which may be applied to many."""


class FoldKeyNorm(ReversibleTransformation):
    """:func:`innerq_compile.fold_key_norm` on a graph, in place.

    Args:
        calibration: Input tuples of the graph.
        **settings: Keyword arguments of :func:`innerq_compile.fold_key_norm`.
    """

    preserves_computation = True

    def __init__(self, calibration: Sequence[tuple[Any, ...]], **settings: Any) -> None:
        super().__init__()
        self.calibration = tuple(calibration)  # optimum hashes every attribute
        self.settings = tuple(sorted(settings.items()))

    def transform(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Folds, or raises :class:`~innerq_compile.passes.key_norm.trace_projections.FoldRefused` and does nothing."""
        handle = fold_key_norm(graph_module, self.calibration, progress=False, **dict(self.settings))
        graph_module.meta.setdefault(_HANDLES, []).append(handle)
        return graph_module

    def reverse(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Puts the former parameters back, bit for bit.

        Raises:
            ValueError: Nothing was folded here.
        """
        _latest(graph_module, _HANDLES).restore()
        return graph_module


class FuseDecodeAttention(ReversibleTransformation):
    """Rewrites attention over an InnerQ cache to read packed codes, as the ``innerq`` backend does.

    Args:
        exact: Forbids kernels to round queries and probabilities (on a CPU to integers, on a GPU to float16).
    """

    preserves_computation = True

    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact

    def transform(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Runs the passes; a site that cannot be rewritten stays as it is."""
        graph_module.meta.setdefault(_GRAPHS, []).append(copy.deepcopy(graph_module.graph))
        run_passes(graph_module, exact=self.exact)
        return graph_module

    def reverse(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Puts the former graph back.

        Raises:
            ValueError: Nothing was fused here.
        """
        graph_module.graph = _latest(graph_module, _GRAPHS)
        return graph_module


def _latest(graph_module: fx.GraphModule, key: str) -> Any:
    kept = graph_module.meta.get(key)
    if not kept:
        raise ValueError("this graph was not transformed, there is nothing to reverse")
    return kept.pop()
