"""FX passes that rewrite a decoding graph to read the quantized cache, one transformation a file.

``canonicalize`` reads every dialect of torch alike, ``match`` finds the sites and says no with a reason,
``fuse_decode`` rewrites one site, ``verify`` checks the result. A site that is not recognised costs speed, never
correctness. Beside this pipeline stand ``capture_static_cache`` and ``dynamic_cache``, for transformers' own caches.
"""

from __future__ import annotations

from torch import fx

from innerq_compile.passes.decode.canonicalize import canonicalize
from innerq_compile.passes.decode.fuse_decode import fuse_decode
from innerq_compile.passes.decode.match import DecodeSite, match
from innerq_compile.passes.decode.verify import verify
from innerq_compile.passes.report import REWRITTEN, Report, SiteReport


def run_passes(gm: fx.GraphModule, *, exact: bool = False) -> Report:
    """Rewrites every site of ``gm`` that can be, in place, and reports on all of them.

    Args:
        gm: A graph at the level of torch functions, as Dynamo hands it to a backend.
        exact: Forbids kernels to round queries and probabilities (on a CPU to integers, on a GPU to float16).

    Raises:
        PassError: The rewrite broke one of its own promises.
    """
    canonicalize(gm.graph)
    found = match(gm.graph)
    sites = []
    for item in found:
        if isinstance(item, DecodeSite):
            fuse_decode(gm.graph, item, exact=exact)
            sites.append(SiteReport(item.path, REWRITTEN))
        else:
            sites.append(SiteReport(item.path, item.status, item.reason))
    report = Report(tuple(sites))
    verify(gm, found, report)
    gm.recompile()
    return report
