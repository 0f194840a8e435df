"""The goals that were set for one H100 before anything was measured, and whether a row meets them."""

from __future__ import annotations

from typing import Any

BEST_CASE_SPEEDUP = {"base": 3.0, "small": 3.3}
SHARE, STRETCH_SHARE, LONG_TOKENS = 0.60, 0.75, 128 * 1024
MIDDLE_SPEEDUP, MIDDLE_CONTEXT = 1.5, 32 * 1024
FLOOR_SPEEDUP, FLOOR_CONTEXT = 0.95, 4 * 1024


def of_attention(row: dict[str, Any]) -> dict[str, Any]:
    """``{"goals": {text: met}}`` for a row of a preset; empty where no goal applies.

    Args:
        row: ``batch``, ``context``, ``way``, ``share_of_ceiling`` and, where a 16-bit way ran, ``speedup``.
    """
    found: dict[str, bool] = {}
    speedup = row.get("speedup")
    if row["batch"] * row["context"] >= LONG_TOKENS and row["way"] in BEST_CASE_SPEEDUP:
        found[f"at least {SHARE:.0%} of the ceiling"] = row["share_of_ceiling"] >= SHARE
        found[f"stretch: {STRETCH_SHARE:.0%} of the ceiling"] = row["share_of_ceiling"] >= STRETCH_SHARE
        if speedup is not None:
            wanted = BEST_CASE_SPEEDUP[row["way"]]
            found[f"at least {wanted}x the best bf16"] = speedup >= wanted
    if speedup is not None and row["way"] in BEST_CASE_SPEEDUP:
        if row["batch"] == 1 and row["context"] == MIDDLE_CONTEXT:
            found[f"at least {MIDDLE_SPEEDUP}x the best bf16"] = speedup >= MIDDLE_SPEEDUP
        if row["context"] >= FLOOR_CONTEXT:
            found[f"never below {FLOOR_SPEEDUP}x from 4k"] = speedup >= FLOOR_SPEEDUP
    return {"goals": found} if found else {}
