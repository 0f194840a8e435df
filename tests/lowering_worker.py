"""Compiles a small Llama for a GPU that is not there; prints, as JSON, what Inductor's code for each graph does.

A process of its own: kernels must not be interpreted, and the stand-ins stay for good.
"""

import ast
import contextlib
import itertools
import json
import logging
import re
import sys
import traceback
import types

import torch
from stand_in_gpu import fake_model, pretend
from torch._dynamo.utils import counters
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import graph as inductor_graph
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, StaticCache

from innerq_compile import InnerQCache
from innerq_compile.cache import overflow
from innerq_compile.kernels.triton import analysis

CAPACITY, PROMPT = 4096, 200
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=CAPACITY,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)

CALL = re.compile(r"^ +(?:\w+ = )?((?:\w+\.)*\w+)\((.*)\)$", re.MULTILINE)
NO_WORK = ("args.clear", "torch.cuda._DeviceGuard", "torch.cuda.set_device", "get_raw_stream", "reinterpret_tensor")
ALLOCATION = re.compile(r"= empty_strided_cuda\((\(.*?\)), \(.*?\), torch\.(\w+)\)")


class Recorder(logging.Handler):
    """Keeps the code that Inductor would load, what its CUDA graphs are told, and every warning of torch."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        logging.getLogger("torch").addHandler(self)
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch"):  # torch's loggers do not propagate
                logging.getLogger(name).addHandler(self)
        self.codes: list[str] = []
        self.graphs: list[dict] = []
        self.warnings: list[str] = []
        self.analysed: list[str] = []
        for name in analysis.NAMES:
            if hasattr(triton_kernel_wrap, name):
                setattr(triton_kernel_wrap, name, self.noting(getattr(triton_kernel_wrap, name)))
        inductor_graph.GraphLowering.compile_to_module = lambda lowering: self.keep_code(lowering)

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())

    def noting(self, analyse):
        def noted(kernel, *arguments):
            self.analysed.append(kernel.base_fn.__name__ if hasattr(kernel, "configs") else kernel.__name__)
            return analyse(kernel, *arguments)

        return noted

    def keep_code(self, lowering):
        self.codes.append(lowering.codegen()[0].value)
        [output] = lowering.module.graph.find_nodes(op="output")

        def call(arguments):
            return tuple(x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in output.args[0])

        runner = types.SimpleNamespace(call=call, partitions=[], recursively_apply_fns=self.keep_graphs)
        return types.SimpleNamespace(call=call, runner=runner, __file__="")

    def keep_graphs(self, functions) -> None:
        for partial in functions:
            indices = ("static_input_idxs", "mutated_input_idxs")
            self.graphs.append({name: sorted(partial.keywords[name]) for name in indices})

    def take(self) -> dict:
        """What was compiled since the last call, which must be one graph."""
        [code] = self.codes
        found = {"graphs": self.graphs, "warnings": self.warnings, "skips": counters["inductor"]["cudagraph_skips"]}
        found |= facts(code) | {"analysed": self.analysed}
        self.codes, self.graphs, self.warnings, self.analysed = [], [], [], []
        return found


def facts(code: str) -> dict:
    """The calls of the generated code in their order, arguments as written, and the tensors that it allocates."""
    body = code[code.rindex("async_compile.wait") :] if "def partition_0" not in code else ""
    body = body or code[code.index("def partition_0") : code.rindex("async_compile.wait")]
    calls = []
    for name, arguments in CALL.findall(body):
        if name not in NO_WORK and not name.startswith(("assert_", "empty_strided")):
            name = re.sub(r"^(triton_[a-z]+_fused).*\.run$", r"\1", name).removesuffix(".run")
            calls.append((re.sub(r"_\d+$", "", name.removeprefix("extern_kernels.")), arguments.split(", ")))
    sizes = [(ast.literal_eval(shape), dtype) for shape, dtype in ALLOCATION.findall(body)]
    return {
        "calls": calls,
        "partitions": len(re.findall(r"^def partition_\d+", code, re.MULTILINE)),
        "as long as the cache": [(shape, dtype) for shape, dtype in sizes if CAPACITY in shape],
    }


class LengthCopy:
    """A copy of counts on its way to the host, which arrives before the next call with a made-up length."""

    made_up = PROMPT
    started = 0

    def __init__(self, counts) -> None:
        self.start(counts)

    def start(self, counts) -> None:
        assert counts.device.type == "cuda"
        LengthCopy.started += 1

    def length(self):
        return LengthCopy.made_up


class HostReads(TorchFunctionMode):
    """Notes every call through which the host waits for a number of the device, and makes one up."""

    NAMES = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = []
        self.copies: list[int] = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = getattr(function, "__name__", "")
        moved = name == "to" and "cpu" in map(str, (*arguments[1:], *keywords.values()))
        if (name in self.NAMES or moved) and arguments[0].device.type == "cuda":
            callers = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.steps[-1].append(callers[-1].filename)
            if name == "__bool__":  # also what generate() asks to know whether it is done
                return False
            if name not in ("cpu", "to"):
                return [0] * arguments[0].numel() if name == "tolist" else 0
        return function(*arguments, **keywords)


def host_reads(model, mode, cache, num_steps: int) -> dict[str, list]:
    """Files that read from the device, and copies of lengths begun, for each call of the model by ``generate()``."""
    reads = HostReads()

    def count(*_):
        if len(reads.steps) == num_steps:
            raise StopIteration
        reads.steps.append([])
        reads.copies.append(LengthCopy.started)

    hook = model.register_forward_pre_hook(count)
    reads.steps.append([])
    with mode, torch.no_grad(), contextlib.suppress(StopIteration), reads:
        ids = torch.zeros(2, PROMPT, dtype=torch.int64, device="cuda")
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "disable_compile": True}
        model.generate(ids, past_key_values=cache, max_new_tokens=PROMPT, **settings)
    hook.remove()
    return {"files": reads.steps, "copies": [b - a for a, b in itertools.pairwise(reads.copies)]}


def refusal(call) -> str:
    """The error of a call over a full cache."""
    LengthCopy.made_up, overflow.read_length = CAPACITY, lambda counts: CAPACITY
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"


def main() -> None:
    pretend()
    overflow.Copy, overflow.read_length = LengthCopy, lambda counts: PROMPT
    recorder = Recorder()
    model, mode = fake_model(CONFIG)

    def tokens(batch, count):
        return torch.zeros(batch, count, dtype=torch.int64, device="cuda")

    def compiled():
        torch._dynamo.reset()
        return torch.compile(model, backend="innerq", mode="reduce-overhead", fullgraph=True)

    def prompted(batch):
        cache = InnerQCache(CONFIG, max_cache_len=CAPACITY)
        with mode:
            model(tokens(batch, PROMPT), past_key_values=cache)
        return cache

    one, full, two, empty = prompted(1), prompted(1), prompted(2), InnerQCache(CONFIG, max_cache_len=CAPACITY)
    found = {}
    with mode, torch.no_grad():
        step = compiled()
        for _ in range(3):
            step(tokens(1, 1), past_key_values=one)
        found["decode"] = recorder.take()
        found["full"] = refusal(lambda: step(tokens(1, 1), past_key_values=full))
        LengthCopy.made_up, overflow.read_length = PROMPT, lambda counts: PROMPT
        mask = torch.ones(2, 1, 1, CAPACITY, dtype=torch.bool, device="cuda")
        compiled()(tokens(2, 1), attention_mask=mask, position_ids=tokens(2, 1), past_key_values=two)
        found["generate"] = recorder.take()
        compiled()(tokens(1, PROMPT), past_key_values=empty)
        found["prefill"] = recorder.take()
    caches = {"static": StaticCache(config=CONFIG, max_cache_len=CAPACITY)}
    caches["packed"] = InnerQCache(CONFIG, max_cache_len=CAPACITY)
    found["host reads"] = {name: host_reads(model, mode, cache, 4) for name, cache in caches.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
