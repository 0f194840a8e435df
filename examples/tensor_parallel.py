"""A model whose heads are spread over several processes; each holds the packed keys and values of its own.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import innerq_compile

path = "innerq_compile/demo/model"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_plan="auto"))
innerq_compile.enable(model, preset="base")
inputs = tokenizer("def quicksort(items):", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
