"""Counts instructions by kind, and says what their number alone allows.

Per 1000 codes a kernel's *lane operations* are counted: instructions of the innermost loop x 32 lanes x warps / codes
of an iteration; without a loop, of the longest way through the program (``paths``).
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable

from sass import hopper
from sass.launches import Specialisation

CLOCKS = hopper.PROCESSORS * hopper.CLOCK
RATES = {
    "integer": 64 * CLOCKS, "float": 128 * CLOCKS, "all": 128 * CLOCKS, "shared": 32 * CLOCKS,
    "memory": hopper.BANDWIDTH,
}  # fmt: skip
"""Lane operations per second of an H100 SXM (memory: bytes)."""

KINDS = {
    "matrix": r"(HMMA|IMMA|QGMMA|HGMMA|IGMMA)",
    "shared": r"(LDS|STS|LDSM|STSM|SHFL|LDGSTS|ATOMS)\b",
    "global": r"(LDG|STG|LDL|STL|ATOMG|RED)\b",
    "conversion": r"(F2F|F2FP|I2F|I2FP|F2I|HADD2\.F32)",
    "float": r"(FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|FCHK|MUFU|HADD2|HFMA2|HMUL2|HMNMX2|FSET)",
    "integer": r"(LOP3|SHF|IADD3|IMAD|ISETP|VIADD|VIMNMX|LEA|PRMT|SEL|BFE|SGXT|IABS|IMNMX|POPC|PLOP3|I2I|BMSK|FLO)",
}
"""Kind of instruction by the beginning of its name, first match first. HADD2.F32 turns float16 into float32."""


def lane_operations(names: Iterable[str], item: Specialisation) -> dict[str, float]:
    """Lane operations per 1000 codes of each kind, and of "all"."""
    kinds = collections.Counter(kind_of(name) for name in names)
    per_1000 = 1000 * 32 * item.options["num_warps"] / item.codes
    return {
        **{kind: round(count * per_1000, 1) for kind, count in kinds.items()},
        "all": round(kinds.total() * per_1000, 1),
    }


def kind_of(name: str) -> str:
    """Kind of an instruction; "other" are branches, barriers and what a warp does once, in its uniform unit."""
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "other")


def bounds(numbers: dict[str, float], item: Specialisation) -> dict[str, float]:
    """Nanoseconds per million codes that each limit of an H100 allows at best."""
    at_least = {kind: numbers.get(kind, 0) / RATES[kind] for kind in ("integer", "float", "all", "shared")}
    at_least["memory"] = 1000 * item.bytes_per_code / RATES["memory"]
    return {kind: seconds * 1e12 for kind, seconds in at_least.items()}
