"""A group of rivals in a process of its own: threads, libraries and crashes of one cannot touch another's times.

    python -m rivals.worker GROUP '{"q_heads": 32, "heads": 8, "head_dim": 64, "tokens": 4096, "threads": 2}'

First one line of JSON per rival, what was found; then, for every line "NUMBER" on the standard input, one with the
seconds of one timed step of the rival of that number.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from typing import TextIO

import numpy as np

from rivals import GROUPS, Case, Rival
from rivals.interface import Step


def prepare(rival: Rival, case: Case, right: np.ndarray) -> tuple[Step | None, dict[str, object]]:
    """The rival's step, or None; and what there is to say about it."""
    try:
        step = rival.prepare(case)
    except ImportError:
        return None, {"missing": "not installed"}
    except Exception as error:  # noqa: BLE001 - another library's failure is a row of the table
        return None, {"missing": f"failed: {str(error).strip().splitlines()[0]}"}
    got = np.asarray(step(1), np.float64).reshape(right.shape)
    error = float(np.linalg.norm(got - right) / np.linalg.norm(right))
    return step, {"version": importlib.metadata.version(rival.package), "error": error}


def main(group: str, case: Case, replies: TextIO) -> None:
    """Prepares the group, then serves."""
    right = case.attention()
    steps = []
    for rival in GROUPS[group]:
        step, facts = prepare(rival, case, right)
        steps.append(step)
        print(json.dumps(facts), file=replies, flush=True)
    for line in sys.stdin:
        step = steps[int(line)]
        step(0)  # code warm, the data of the next call cold
        begin = time.perf_counter()
        step(1)
        print(time.perf_counter() - begin, file=replies, flush=True)


if __name__ == "__main__":
    if cpus := os.environ.get("RIVALS_CPUS"):
        os.sched_setaffinity(0, map(int, cpus.split()))
    # Libraries print what they like; only the replies may reach the parent.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], Case(**json.loads(sys.argv[2])), channel)
