"""What a section was doing: started again after its process broke, it leaves out what broke it and what it had done."""

from __future__ import annotations

from gpu_suite.context import Context
from gpu_suite.jobs import read_rows

TABLE = "journal"
DONE, TIMING = "done", "timing"


class Journal:
    """Rows :data:`TABLE` of a section; rows ``broken`` name what its earlier processes ended in.

    Attributes:
        broken: Ways (kernels, presets) that ended a process; none of them is run again.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        tables = read_rows(context.rows)
        rows = tables.get(TABLE, [])
        if rows and rows[-1]["way"] != DONE:
            context.emit("broken", **rows[-1])
        broken = [*tables.get("broken", []), *(row for row in rows[-1:] if row["way"] != DONE)]
        self.broken = {row["way"] for row in broken if row["way"] != TIMING}
        self._left = {row["case"] for row in broken if row["way"] == TIMING}
        self._left |= {row["case"] for row in rows if row["way"] == DONE}

    def has(self, case: str) -> bool:
        """Whether nothing is left to do for this case: it is done, or its timing ended a process."""
        return case in self._left

    def begin(self, case: str, way: str) -> None:
        """Notes what is about to run."""
        self.context.emit(TABLE, case=case, way=way)

    def done(self, case: str) -> None:
        """Notes that a case has all its rows."""
        self.begin(case, DONE)
