"""Prompts of different lengths in one batch: each gives what it gives alone.

python examples/batch.py "import os" "def add(a, b):"
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from innerq_compile import enable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="+")
parser.add_argument("--model", default="innerq_compile/demo/model")
parser.add_argument("--new-tokens", type=int, default=40)
args = parser.parse_args()

tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
tokenizer.padding_side = "left"  # a decoder writes on from the right edge
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
enable(model)
# The attention mask that the tokenizer makes is what tells the cache which columns are pads.
inputs = tokenizer(args.prompts, return_tensors="pt", padding=True).to(model.device)
out = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)
for prompt, row in zip(args.prompts, out, strict=True):
    print(f">>> {prompt}\n{tokenizer.decode(row[inputs.input_ids.shape[1] :])}")
