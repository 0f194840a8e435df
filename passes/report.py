"""What was rewritten, what was refused and why: plain data, readable as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tabulate import tabulate

REWRITTEN, REFUSED, LEFT = "rewritten", "refused", "left"
"""Fates of a site: reads packed codes; could have, but the graph around it forbids it; was never meant to."""


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One place where a layer attends to its cache.

    Attributes:
        path: Module path of the attention layer, or the name of its node in the graph where no path is known.
        status: ``"rewritten"``, ``"refused"`` or ``"left"``.
        reason: Why it was not rewritten; empty where it was.
    """

    path: str
    status: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The sites of one graph, or of several graphs added up.

    Attributes:
        sites: In graph order.
        note: What to do about a model that has no site at all; empty otherwise.
    """

    sites: tuple[SiteReport, ...] = ()
    note: str = ""

    @property
    def found(self) -> int:
        """Sites that read a quantized cache for decoding: those rewritten and those refused."""
        return self.rewritten + self.refused

    @property
    def rewritten(self) -> int:
        """Sites that now read packed codes."""
        return self._count(REWRITTEN)

    @property
    def refused(self) -> int:
        """Sites that still dequantize the whole cache; right, but slow."""
        return self._count(REFUSED)

    @property
    def left(self) -> int:
        """Layers and chunks that are not decoding from a quantized cache: prefill, long chunks, 16-bit layers."""
        return self._count(LEFT)

    def __add__(self, other: Report) -> Report:
        """Both reports' sites, in order."""
        return Report(self.sites + other.sites, "\n".join(dict.fromkeys(filter(None, (self.note, other.note)))))

    def __str__(self) -> str:
        """A table of the sites below one line of counts."""
        lines = [f"{self.found} sites found: {self.rewritten} rewritten, {self.refused} refused; {self.left} left"]
        if self.sites:
            rows = [dataclasses.astuple(site) for site in self.sites]
            lines.append(tabulate(rows, headers=["layer", "status", "reason"], maxcolwidths=[None, None, 80]))
        return "\n".join([*lines, *filter(None, [self.note])])

    def to_json(self) -> dict[str, Any]:
        """Counts, sites and note as plain types."""
        counts = {name: getattr(self, name) for name in ("found", "rewritten", "refused", "left")}
        return {**counts, "sites": [dataclasses.asdict(site) for site in self.sites], "note": self.note}

    def dumps(self) -> str:
        """:meth:`to_json` as text."""
        return json.dumps(self.to_json(), indent=2)

    def _count(self, status: str) -> int:
        return sum(site.status == status for site in self.sites)
