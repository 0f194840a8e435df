"""transformers' tensor parallelism over two processes: each holds the packed keys and values of its own heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from innerq_compile import InnerQCache

RANKS, NEW_TOKENS = 2, 24
WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "examples" / "tensor_parallel.py"

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)


@pytest.mark.long
@needs_gloo
@pytest.mark.slow
def test_ranks_hold_their_own_heads_and_generate_what_one_process_does(tiny_config, make_model, tmp_path):
    tiny_config.initializer_range = 0.2  # the default makes a random model repeat one token
    model = make_model(tiny_config)
    model.save_pretrained(tmp_path)
    ids = torch.randint(1, 256, (1, 200), generator=torch.Generator().manual_seed(0))
    cache = InnerQCache(tiny_config, max_cache_len=ids.shape[1] + NEW_TOKENS)
    mask = torch.ones_like(ids)
    alone = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()
    assert len(set(alone)) > NEW_TOKENS // 3

    # INNERQ_TEST_INDUCTOR=1 compiles for real, on both ranks: a minute that a run of all tests does not have.
    how = "inductor" if os.environ.get("INNERQ_TEST_INDUCTOR") else "passes"
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    arguments = [str(PROGRAM), str(tmp_path), json.dumps(ids[0].tolist()), str(NEW_TOKENS), how]
    done = subprocess.run(
        [*torchrun, str(WORKER), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Lines of two processes may come out without a line break between them.
    decoder, ranks, text = json.JSONDecoder(), [], done.stdout.strip()
    while text:
        held, end = decoder.raw_decode(text)
        ranks.append(held)
        text = text[end:].strip()

    layers, heads = tiny_config.num_hidden_layers, tiny_config.num_key_value_heads
    assert sorted(held["rank"] for held in ranks) == list(range(RANKS))
    for held in ranks:
        assert held["tokens"] == alone
        assert held["heads"] == [heads // RANKS] * layers
        assert min(held["quantized"]) > 0
        assert held["rewritten"] == layers
        assert "quicksort" in held["said"]
    counts = sum(layer.state.counts.untyped_storage().nbytes() for layer in cache.layers)
    assert sum(held["bytes"] - counts for held in ranks) == cache.memory_bytes - counts
