"""One rank of the tensor-parallel test: runs the example, then generates with a shard of its own model.

Arguments: the program, directory of the model, JSON list of prompt tokens, number of new tokens, "inductor" or
"passes", which runs the graphs as the passes leave them. Prints a line of JSON about what this rank holds.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch
from torch._inductor import compile_fx
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from innerq_compile import InnerQCache, enable
from innerq_compile.compiler import backend
from innerq_compile.passes.decode import run_passes


def main(program: str, folder: str, prompt: str, new_tokens: str, how: str) -> None:
    if how == "passes":
        compile_fx.compile_fx = lambda gm, example_inputs, **settings: gm.forward
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(Path(program).read_text(encoding="utf-8"), {})
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    enable(model, exact=True)
    torch._dynamo.reset()
    reports = []
    backend.run_passes = lambda gm, **settings: reports.append(run_passes(gm, **settings)) or reports[-1]
    ids = torch.tensor([json.loads(prompt)])
    cache = InnerQCache(model.config, max_cache_len=ids.shape[1] + int(new_tokens))
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=int(new_tokens),
        do_sample=False,
    )
    held = {
        "rank": int(os.environ["RANK"]),
        "tokens": tokens[0, ids.shape[1] :].tolist(),
        "said": said.getvalue(),
        "rewritten": sum(report.rewritten for report in reports),
        "heads": [layer.state.k_codes.shape[1] for layer in cache.layers],
        "quantized": [int(layer.state.counts[0, 1]) for layer in cache.layers],
        "bytes": cache.memory_bytes,
    }
    sys.stdout.write(json.dumps(held) + "\n")


main(*sys.argv[1:])
