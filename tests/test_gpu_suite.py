"""The GPU suite without a GPU: it runs to its end, survives its sections, and renders nothing that was not measured."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "benchmarks" / "gpu_suite"


@pytest.fixture(scope="module")
def suite():
    """Imports a module of the suite, which is no installed package."""
    sys.path.append(str(SUITE.parent))
    yield lambda name: importlib.import_module(f"gpu_suite.{name}")
    sys.path.remove(str(SUITE.parent))


@pytest.fixture(scope="module")
def dry_record(tmp_path_factory):
    out = tmp_path_factory.mktemp("dry")
    command = [sys.executable, str(SUITE), "--dry", "--in-process", "--out", str(out)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((out / "gpu-dry.json").read_text())


@pytest.mark.slow
def test_a_dry_run_ends_with_every_section_done(dry_record, suite):
    sections = dry_record["sections"]
    assert list(sections) == [section.name for section in suite("plan").SECTIONS]
    assert {name: s["status"] for name, s in sections.items()} == dict.fromkeys(sections, "ok")
    checks = sections["correctness"]["tables"]["checks"]
    assert {row["op"] for row in checks} == {"append_kv", "dequantize_kv", "decode_attention"} and all(
        row["ok"] for row in checks
    )
    broken = {name: s["tables"].get(table) for name, s in sections.items() for table in ("failed", "wrong", "late")}
    assert not any(broken.values()), broken
    models = sections["end_to_end"]["tables"]["end_to_end"]
    assert {row["cache"] for row in models} == {"static", "base"}
    assert all(row["recompiles"] == 0 for row in models), "preparing ahead did not compile what is measured"


@pytest.mark.slow
def test_a_dry_result_is_not_rendered_and_a_measured_one_is(dry_record, suite, tmp_path):
    render = suite("render")
    path = tmp_path / "gpu-some.json"
    path.write_text(json.dumps(dry_record))
    assert render.markdown(tmp_path) == render.NOT_MEASURED
    path.write_text(json.dumps({**dry_record, "dry": False}))
    shown = render.markdown(tmp_path)
    for text in (
        "Decode attention",
        "products QK^T",
        "on tensor cores",
        "over KIVI",
        "Append and prefill",
        "Whole models",
        "Largest batch",
        torch.__version__,
    ):
        assert text in shown


def test_what_failed_is_rendered_beside_what_was_measured(suite, tmp_path):
    case = {"q_heads": 32, "heads": 8, "head_dim": 128, "batch": 1, "context": 131072}
    base = {**case, "way": "base", "us": 60.0, "share_of_ceiling": 0.55, "speedup": 2.5, "best_bf16": "cudnn stacked"}
    base["goals"] = suite("goals").of_attention(base)["goals"]
    tables = {
        "environment": {"machine": [{"gpu": "H100", "torch": "2.11"}], "ceiling": [{"way": "r", "gb_per_s": 3.0}]},
        "correctness": {"checks": [{"part": "int4", "op": "append_kv", "ok": ok} for ok in (True, False)]},
        "gpu_tests": {"pytest": [{"part": "marked", "status": 1, "counts": {"failed": 2, "passed": 12}}]},
        "decode": {
            "attention": [base, {**case, "way": "cudnn stacked", "us": 150.0, "share_of_ceiling": 0.9},
                          {**case, "context": 262144, "skipped": "out of time"}],
            "broken": [{"case": "32/8/128/8/4096", "way": "int8"}],
        },
        "end_to_end": {"end_to_end": [{"model": "8b", "cache": "static", "batch": 8, "skipped": "does not fit"}]},
    }  # fmt: skip
    sections = {name: {"status": "ok", "processes": [], "tables": found} for name, found in tables.items()}
    sections["decode"]["processes"] = [{"part": "mha", "status": "timeout", "seconds": 90}]
    record = {"dry": False, "seconds": 1.0, "source": {"commit": "abc", "digest": "d"}, "sections": sections}
    (tmp_path / "gpu-forged.json").write_text(json.dumps(record))
    shown = suite("render").markdown(tmp_path)
    for text in (
        "1 of 2 comparisons", "Wrong: append_kv of int4.", "Tests (marked): 2 failed, 12 passed.",
        "decode mha (timeout)", "int8 in 32/8/128/8/4096", "60.0 (2.50x; 55%)", "150.0 (cudnn stacked)",
        "32/8/128x1x262144 (out of time)", "0 of 1", "not met", "commit abc",
    ):  # fmt: skip
        assert text in shown, text
    assert "Whole models" not in shown
    assert suite("summary").failed(record)


def test_a_journal_leaves_out_what_ended_its_process(suite, tmp_path):
    context = suite("context").Context(torch.device("cpu"), True, "", tmp_path / "rows", time.monotonic() + 60)
    journal = suite("journal").Journal
    first = journal(context)
    first.begin("a", "base")
    first.done("a")
    first.begin("b", "int4")
    second = journal(context)
    assert second.has("a") and not second.has("b") and second.broken == {"int4"}
    second.begin("b", "timing")
    third = journal(context)
    assert third.has("b") and third.broken == {"int4"}
    assert journal(context).broken == {"int4"}, "what was noted once stays noted"


def test_a_section_that_keeps_a_journal_is_started_again(suite, tmp_path, monkeypatch):
    plan, schedule = suite("plan"), suite("schedule")
    code = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    )
    code += "; sys.exit(p.read_text() != 'xx')"
    command = [sys.executable, "-c", code, str(tmp_path / "starts")]
    monkeypatch.setattr(schedule, "child_argv", lambda job, **_: command)
    sections = [plan.Section("a", "", 50, resumes=True)]
    run = schedule.Schedule(
        sections, tmp_path, budget=60, dry=True, environment=dict(os.environ), flush=lambda found: None
    )
    (record,) = run.run()["a"]["processes"]
    assert record["starts"] == 2 and record["status"] == "failed", "a crash is told even if the rest was measured"


HELD = """
import json, pathlib, sys, time
rows, gate = (pathlib.Path(path) for path in sys.argv[1:])
gate.with_suffix('.ready').touch()
while not gate.with_suffix('.go').exists():
    time.sleep(0.01)
began = time.time()
time.sleep(0.2)
rows.write_text(json.dumps({'table': 't', 'began': began, 'ended': time.time()}) + '\\n')
"""


def test_held_processes_prepare_together_and_measure_one_by_one(suite, tmp_path, monkeypatch):
    plan, schedule = suite("plan"), suite("schedule")
    monkeypatch.setattr(schedule, "HELD_AT_ONCE", 2)
    monkeypatch.setattr(schedule, "child_argv", lambda job, **_: [sys.executable, "-c", HELD, job.rows, job.gate])
    sections = [plan.Section("a", "", 50, parts=("1", "2", "3"), held=True, nice=1)]
    run = schedule.Schedule(
        sections, tmp_path, budget=60, dry=True, environment=dict(os.environ), flush=lambda found: None
    )
    found = run.run()["a"]
    assert found["status"] == "ok", found
    times = sorted((row["began"], row["ended"]) for row in found["tables"]["t"])
    assert len(times) == 3 and all(times[i][1] <= times[i + 1][0] for i in range(2))


def run_job(suite, tmp_path, code, seconds=20.0):
    job = suite("jobs").Job("some", "part/1", tmp_path, seconds)
    job.start([sys.executable, "-c", code, str(job.rows), str(job.gate)], dict(os.environ))
    return job


def wait_for(job):
    until = time.monotonic() + 30
    while job.poll():
        assert time.monotonic() < until
        time.sleep(0.02)
    return job.record()


EMIT = 'import sys, time; open(sys.argv[1], \'a\').write(\'{"table": "t", "x": 1}\\n{"table": "t", "x"\')\n'


def test_a_section_that_breaks_keeps_its_rows_and_its_traceback(suite, tmp_path):
    job = run_job(suite, tmp_path, EMIT + "raise ValueError('on purpose')")
    record = wait_for(job)
    assert record["status"] == "failed" and "ValueError: on purpose" in record["error"] and record["part"] == "part/1"
    assert suite("jobs").read_rows(job.rows) == {"t": [{"x": 1}]}


def test_a_section_that_hangs_is_ended_with_its_children(suite, tmp_path):
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    job = run_job(suite, tmp_path, code, seconds=1.0)
    assert wait_for(job)["status"] == "timeout"
    time.sleep(1.5)
    assert not late.exists()


def test_a_held_section_waits_for_its_turn(suite, tmp_path):
    context = suite("context").Context
    code = (
        f"import sys, time, torch; sys.path.append({str(SUITE.parent)!r})\n"
        "from pathlib import Path\nfrom gpu_suite.context import Context\n"
        "c = Context(torch.device('cpu'), True, '', Path(sys.argv[1]), time.monotonic() + 20, Path(sys.argv[2]))\n"
        "assert c.wait_for_turn() and 4 < c.seconds_left() <= 5\nc.emit('t', done=True)"
    )
    job = run_job(suite, tmp_path, code)
    while not job.is_ready():
        assert job.poll(), job.record()
        time.sleep(0.02)
    assert not suite("jobs").read_rows(job.rows)
    job.go(5.0)
    assert wait_for(job)["status"] == "ok", job.record()
    assert suite("jobs").read_rows(job.rows) == {"t": [{"done": True}]}
    late = context(torch.device("cpu"), True, "", tmp_path / "rows", time.monotonic() - 1, tmp_path / "late.gate")
    assert not late.wait_for_turn()


def test_later_sections_keep_their_least_of_the_budget(suite, tmp_path):
    plan, schedule = suite("plan"), suite("schedule")
    sections = [plan.Section("a", "", 100, least=10), plan.Section("b", "", 50, least=30)]
    run = schedule.Schedule(sections, tmp_path, budget=60, dry=True, environment={}, flush=lambda found: None)
    assert run._seconds_for(sections[0]) == pytest.approx(30, abs=1)
    assert run._seconds_for(sections[1]) == pytest.approx(50, abs=1)
    with pytest.raises(SystemExit, match="no section nonsense"):
        plan.chosen(["nonsense"], dry=True)


def test_goals_are_judged_as_they_were_set(suite):
    judge = suite("goals").of_attention
    row = {"batch": 8, "context": 32768, "way": "base", "share_of_ceiling": 0.7, "speedup": 2.9}
    found = judge(row)["goals"]
    assert found == {
        "at least 60% of the ceiling": True,
        "stretch: 75% of the ceiling": False,
        "at least 3.0x the best bf16": False,
        "never below 0.95x from 4k": True,
    }
    assert judge({**row, "batch": 1, "speedup": 1.6})["goals"]["at least 1.5x the best bf16"]
    assert judge({**row, "batch": 1, "context": 1024, "speedup": 0.5}) == {}


def test_rounded_attention_costs_more_than_exact_and_both_have_a_budget(suite):
    errors = suite("errors")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, n, 32, generator=generator) for n in (1, 96, 96))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    exact = errors.check(out, query, key, value, 32**-0.5, exact=True)
    loose = errors.check(out, query, key, value, 32**-0.5, exact=False)
    assert exact.ok and loose.ok and 100 * exact.budget < loose.budget < 0.05
    assert not errors.check(out * 1.001, query, key, value, 32**-0.5, exact=True).ok
    assert not errors.check(out * float("nan"), query, key, value, 32**-0.5, exact=False).ok


def test_random_caches_hold_what_they_say(suite):
    states = suite("states")
    from innerq_compile.config import InnerQConfig
    from innerq_compile.layout import state_bytes

    config = InnerQConfig.from_preset("hybrid")
    state = states.random_state(config, batch=2, heads=2, head_dim=32, context=320, device=torch.device("cpu"))
    assert state.counts.tolist() == [[320, config.num_quantized(320), 0]] * 2
    asymmetric = torch.signbit(state.v_scales)
    assert not state.v_zeros[~asymmetric].any()
    assert 0 < states.held_bytes(state, config, 320) <= state_bytes(state)
    per_channel = sum(x.numel() * x.element_size() for name, x in state._asdict().items() if name.startswith("key_"))
    windows = 2 * 100 * 2 * 2 * 32 * 2  # keys and values, tokens, rows, heads, channels, bytes
    assert states.held_bytes(state, config, 100) == windows + per_channel
