"""The benchmarks run, and what stands in the documents comes out of their result files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 256


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
    assert sorted(names) == ["decode-attention", "errors", "generate", "gpu", "headline", "key-norm", "rivals"]
