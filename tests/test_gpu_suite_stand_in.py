"""The suite's code that only a GPU runs, with ``torch.cuda`` replaced by stand-ins: graphs, events, memory, restarts.

A copy of the suite takes the CPU for its GPU, so every branch that asks for one is taken.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "benchmarks" / "gpu_suite"

STAND_INS = """
import contextlib, json, sys, time, types
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import torch

cuda, captured = torch.cuda, []


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing
    def record(self):
        pass
    def synchronize(self):
        pass
    def elapsed_time(self, other):
        return 0.25


class Graph:
    def replay(self):
        captured.append(self)


class Stream:
    def wait_stream(self, other):
        pass


cuda.Event, cuda.CUDAGraph, cuda.graph = Event, Graph, lambda graph: contextlib.nullcontext()
cuda.Stream = cuda.current_stream = Stream
cuda.stream = lambda stream: contextlib.nullcontext()
cuda.synchronize = cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *_: None
cuda._sleep = lambda cycles: None
cuda.max_memory_allocated = lambda *_: 123
cuda.mem_get_info = lambda *_: (3_000_000_000, 4_000_000_000)
cuda.get_device_properties = lambda *_: types.SimpleNamespace(
    multi_processor_count=4, L2_cache_size=100_000, name="Stand-in", total_memory=4_000_000_000, major=9, minor=0
)

from gpu_suite import append, decode, end_to_end, environment, memory, models, products, render, summary
from gpu_suite.context import Context
from gpu_suite.jobs import read_rows

GQA = decode.Case(4, 2, 32, 1, 300)
decode.CASES = [GQA, decode.Case(4, 2, 32, 4, 2**17), decode.Case(2, 2, 32, 1, 260)]
decode.FLEX_CASES = []
decode.best_reader = lambda device: (None, 100.0)
make_pair, make_state = decode._pair, decode._state


def pair(context, case):
    if case.context > 300:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return make_pair(context, case)


def state(context, case, preset):
    if preset == "int4":  # this kernel's process ends here, and a second one takes over
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return make_state(context, case, preset)


decode._pair, decode._state = pair, state
environment.measure_ceiling = lambda context: [{"way": "read", "gb_per_s": 100.0}]
append.HEADS, append.HEAD_DIM, append.CONTEXTS, append.BATCHES = 1, 32, (300,), (1,)
append.PRESETS = append.PRESETS[:1]
products.HEAD_DIM, products.SETTINGS = 64, [(1, 1, 64)]
products._packed_ways = lambda *args: iter(())
models.SHAPES["8b"] = models.SHAPES["1b"] = models.SHAPES["tiny"]
memory.TRIED = ("8b", "base", 200)
end_to_end.backend_of = lambda unit, dry, real=end_to_end.backend_of: real(unit, True)
end_to_end.WARM_UP = end_to_end.STEPS = end_to_end.ROUNDS = 1
parts = {"environment": "", "decode": "gqa", "append": "", "products": "", "memory": "",
         "end_to_end": "8b/base/1/192,224"}
sections = {}
for name, part in parts.items():
    path = Path(sys.argv[2]) / (name + ".jsonl")
    context = Context(torch.device("cpu"), False, part, path, time.monotonic() + 300)
    if name == "decode":
        with contextlib.suppress(RuntimeError):
            decode.run(context)
        assert read_rows(path)["journal"][-1]["way"] == "int4", "its process went on"
    globals()[name].run(context)
    sections[name] = {"title": "", "status": "ok", "processes": [], "tables": read_rows(path)}
assert captured
record = {"schema": 1, "dry": False, "source": {"commit": "abc", "digest": "d"}, "seconds": 1.0, "sections": sections}
(Path(sys.argv[2]) / "gpu-stand-in.json").write_text(json.dumps(record))
print(render.markdown(Path(sys.argv[2])))
print(summary.text(record))
"""


@pytest.mark.slow
def test_everything_that_needs_a_gpu_runs_on_stand_ins(tmp_path):
    copy = tmp_path / "copy" / "gpu_suite"
    copy.mkdir(parents=True)
    for path in SUITE.glob("*.py"):
        (copy / path.name).write_text(path.read_text().replace('"cuda"', '"cpu"'))
    command = [sys.executable, "-c", STAND_INS, str(copy.parent), str(tmp_path)]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "gpu-stand-in.json").read_text())["sections"]

    decode = found["decode"]["tables"]
    assert [row["way"] for row in decode["broken"]] == ["int4"]
    measured = {(row["context"], row["way"]) for row in decode["attention"] if "us" in row}
    assert {(300, "base"), (300, "small"), (300, "int8")} <= measured
    assert (300, "int4") not in measured, "what ended the process is not run again"
    assert all(row["graph"] for row in decode["attention"] if "us" in row)
    assert [row["context"] for row in decode["attention"] if "skipped" in row] == [2**17]
    assert found["append"]["tables"]["append"][0]["graph"] and found["append"]["tables"]["prefill"]
    assert {row["layout"] for row in found["products"]["tables"]["products"]} == {"fp16"}
    assert found["memory"]["tables"]["tried"][0]["peak_bytes"] == 123
    models = found["end_to_end"]["tables"]["end_to_end"]
    assert [row["recompiles"] for row in models] == [0, 0]
    for text in ("Stand-in", "Decode attention", "131072 (does not fit the memory)", "Largest batch"):
        assert text in done.stdout
    assert "ended its process" in done.stdout
