"""The benchmarks run, and what stands in the documents comes out of their result files."""

import contextlib
import importlib
import json
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 256


@pytest.mark.long
@pytest.mark.slow
def test_decode_attention_measures_rivals_or_says_what_is_missing(tmp_path):
    out = tmp_path / "result.json"
    program = [sys.executable, "benchmarks/bench_decode_attention.py", "--output", out, "--rounds", "1"]
    sizes = ["--shapes", "4/2/64", "--contexts", str(TOKENS), "--flush-mib", "1", "--threads", "1"]
    rivals = ["--rivals", "torch", "transformers", "openvino", "llama.cpp"]
    done = subprocess.run([*program, *sizes, *rivals], cwd=ROOT, capture_output=True, text=True, timeout=600)
    if "cannot be built" in done.stderr:
        pytest.skip("no C++ compiler")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    timed = {row["contender"] for row in result["attention"]}
    assert {"int4", "read int4", "base", "small", "hybrid", "int8"} <= timed
    assert len(result["rivals"]) == 15
    for row in result["rivals"]:
        assert (row["contender"] in timed) == ("missing" not in row), row
        if row["package"] == "torch":
            dtype = {16: torch.bfloat16, 32: torch.float32}[row["bits"]]
            assert row["error"] <= TOKENS * torch.finfo(dtype).eps
        elif "missing" in row:
            assert row["missing"] == "not installed"
        else:
            assert row["error"] < 1


def test_tables_in_the_documents_are_those_of_the_result_files():
    show = "import json, render; pages = [page.read_text('utf-8') for page in render.PAGES]; "
    show += "print(json.dumps([[page, render.render(page)] for page in pages]))"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = []
    for written, rendered in json.loads(done.stdout):
        assert written == rendered, "make tables"
        names += re.findall(r"^<!-- ([a-z-]+):", written, re.MULTILINE)
    expected = ["decode-attention", "errors", "generate", "gpu", "headline", "key-norm", "real-model", "rivals"]
    assert sorted(names) == expected


GPU = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def gpu(monkeypatch):
    """Imports a module of the GPU benchmark, which is no installed package."""
    monkeypatch.syspath_prepend(str(GPU.parent))
    return lambda name: importlib.import_module(f"gpu.{name}")


def run_gpu(*arguments):
    return subprocess.run([sys.executable, str(GPU), *arguments], capture_output=True, text=True, timeout=900)


@pytest.mark.long
@pytest.mark.slow
def test_a_dry_run_of_the_gpu_benchmark_ends_and_its_tables_render(gpu, tmp_path):
    """Every section but correctness, whose tests run here anyway."""
    sections = ["machine", "attention", "append", "memory", "models"]
    done = run_gpu(*sections, "--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "part-dry.json").read_text())
    assert {unit["section"]: unit["status"] for unit in record["units"]} == dict.fromkeys(sections, "ok")
    assert "failed" not in record["tables"]
    assert {row["way"] for row in record["tables"]["attention"] if "us" in row} >= {"base", "small", "int4", "int8"}
    models = record["tables"]["models"]
    assert {(row["cache"], row["context"]) for row in models} == {
        (c, n) for c in ("static", "base") for n in (128, 192)
    }
    assert all(row["recompiles"] == 0 and row["error"] < 1e-5 for row in models)
    tables = gpu("tables")
    (tmp_path / "gpu-some.json").write_text(json.dumps(record))
    assert tables.markdown(tmp_path) == tables.NOT_MEASURED, "what a dry run measured is not shown"
    (tmp_path / "gpu-some.json").write_text(json.dumps(record | {"dry": False}))
    shown = tables.markdown(tmp_path)
    for text in ("Decode attention", "Append and prefill", "Whole models", "Largest batch", torch.__version__):
        assert text in shown


def test_what_failed_or_is_missing_is_rendered_beside_what_was_measured(gpu, tmp_path):
    case = {"q_heads": 32, "heads": 8, "head_dim": 128, "batch": 1, "context": 131072}
    base = {**case, "way": "base", "us": 60.0, "gb_per_s": 2000.0, "share_of_ceiling": 0.55, "speedup": 2.5}
    base |= {"best_bf16": "cudnn stacked", "error": 1e-3, "budget": 2e-3}
    tables = {
        "gpu": [{"gpu": "H100"}],
        "ceiling": [{"way": "r", "gb_per_s": 3000.0}],
        "tests": [{"wrong": ["tests/test_gpu.py::one FAILED"], "counts": {"failed": 1, "passed": 12},
                   "files": ["test_gpu.py"], "status": "out of time"}],
        "attention": [base, {**base, "way": "cudnn stacked", "us": 150.0}, {**case, "context": 8, "skipped": "late"},
                      {**case, "way": "int8", "error": 0.5, "budget": 2e-3}],
        "failed": [{**case, "way": "cudnn stacked", "reason": "no such backend"},
                   {"model": "8b", "way": "static", "reason": "OutOfMemoryError: 100 GB"},
                   {**case, "way": "small", "reason": "CUDA error"}],
    }  # fmt: skip
    units = [{"section": "attention", "part": "mha", "status": "out of time"}]
    units += [{"section": "append", "part": "", "status": "failed"}]
    record = {"dry": False, "machine": {"commit": "abc"}, "units": units, "tables": tables}
    (tmp_path / "gpu-forged.json").write_text(json.dumps(record))
    shown = gpu("tables").markdown(tmp_path)
    for text in (
        "H100", "commit abc", "3000 GB/s", "1 failed, 12 passed", "WRONG test tests/test_gpu.py::one FAILED",
        "append  broke", "test_gpu.py (out of time)",
        "int8 at 32/8/128/1/131072: error 5.0e-01", "small at 32/8/128/1/131072: CUDA error", "mha (out of time)",
        "static 8b (does not fit)", "32/8/128/1/8 (late)", "60.0 (2.50x; 2000; 55%)", "150.0 (cudnn stacked)",
    ):  # fmt: skip
        assert text in shown, text
    assert len(gpu("tables").wrong(record)) == 4 and "no such backend" not in shown and "Whole models" not in shown


def test_a_unit_that_crashes_or_hangs_costs_only_itself(gpu, tmp_path, monkeypatch):
    main, rows = gpu("__main__"), tmp_path / "rows"
    monkeypatch.setattr(main, "__file__", str(tmp_path / "program" / "__main__.py"))
    (tmp_path / "program").mkdir()
    program = 'import os, sys, time\nopen(sys.argv[6], \'a\').write(\'\\n{"table": "t", "part": "\' + sys.argv[4])\n'
    program += "time.sleep(sys.argv[4] == 'hangs' and 99)\nos.abort() if sys.argv[4] == 'crashes' else None\n"
    program += "open(sys.argv[6], 'a').write('\"}')\n"
    (tmp_path / "program" / "__main__.py").write_text(program)
    monkeypatch.setattr(main, "GRACE", 0.5)
    states = [main._run("x", part, 3.0, rows, {}, True)["status"] for part in ("crashes", "hangs", "ends")]
    assert states == ["failed", "out of time", "ok"]
    assert main._run("x", "late", 1.0, rows, {}, True)["status"] == "not reached"
    assert main._read(rows) == {"t": [{"part": "ends"}]}


def test_all_units_together_take_less_than_nine_minutes(gpu):
    assert sum(seconds for _, _, seconds in gpu("__main__").PLAN) < 9 * 60 - 10


def test_on_a_gpu_contenders_take_turns_as_graphs_that_do_bench_times(gpu, tmp_path, monkeypatch):
    """With stand-ins for CUDA; one contender cannot be run, and the others are timed all the same."""
    testing = pytest.importorskip("triton.testing")
    turns, captured = [], []
    streams = dict.fromkeys(("Stream", "current_stream"), lambda: unittest.mock.Mock())
    quiet = dict.fromkeys(("synchronize", "empty_cache"), lambda: None)
    for name, stand_in in (streams | quiet | {"CUDAGraph": unittest.mock.Mock}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext(captured.append(graph.replay)))

    def do_bench(call, *, warmup, rep, return_mode):
        turns.append(captured.index(call))
        return [1.0, 3.0, 2.0]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    section = gpu("section").Section("", tmp_path / "rows", float("inf"), dry=False)
    calls = {"a": unittest.mock.Mock(), "broken": unittest.mock.Mock(side_effect=ValueError("no")), "b": lambda: None}
    timings = gpu("timing").interleaved(section, calls)
    assert turns == [0, 1] * gpu("timing").ROUNDS and calls["a"].call_count == 3 + 1
    assert timings.keys() == {"a", "b"} and timings["a"].us == 2000.0
    assert gpu("__main__")._read(tmp_path / "rows") == {"failed": [{"way": "broken", "reason": "ValueError: no"}]}
    calls["broken"].side_effect = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        gpu("timing").interleaved(section, calls)


def test_attention_that_is_a_hundredth_off_is_over_its_budget(gpu):
    check = gpu("timing").check_attention
    query, keys, values = (torch.randn(1, 4, n, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 96, 97))
    values = values[:, :, :96]
    out = gpu("timing").attention64(query, keys, values, torch.float16)
    assert check(out, query, keys, values).ok
    for factor in (1.01, float("nan")):
        assert not check(out * factor, query, keys, values).ok


def test_random_caches_hold_what_they_say(gpu):
    caches = gpu("caches")
    from innerq_compile.numerics.config import InnerQConfig
    from innerq_compile.numerics.layout import state_bytes

    config = InnerQConfig.from_preset("hybrid")
    state = caches.random_state(config, 2, 2, 32, 320, torch.device("cpu"), torch.bfloat16)
    assert state.counts.tolist() == [[320, config.num_quantized(320), 0]] * 2
    assert not state.v_zeros[~torch.signbit(state.v_scales)].any()
    assert 0 < caches.held_bytes(state, config, 320) <= state_bytes(state)
    per_channel = sum(x.numel() * x.element_size() for name, x in state._asdict().items() if name.startswith("key_"))
    windows = 2 * 100 * 2 * 2 * 32 * 2  # keys and values, tokens, rows, heads, channels, bytes
    assert caches.held_bytes(state, config, 100) == windows + per_channel
