"""A question about a long text, of which only packed codes are kept.

    python examples/long_document.py --document notes.txt --question "In short:"

As it stands, it hides a number in front of 3000 tokens of Python and asks the reference model for it.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from innerq_compile import InnerQCache, enable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="innerq_compile/demo/model")
parser.add_argument("--preset", default="base")
parser.add_argument("--document", type=Path, default=Path("innerq_compile/demo/model/heldout.txt"))
parser.add_argument("--hidden", default="remember amber=48213;\n", help="text in front of the document")
parser.add_argument("--question", default="\nrecall amber=")
parser.add_argument("--tokens", type=int, default=3000, help="tokens of the document to read")
parser.add_argument("--new-tokens", type=int, default=6)
args = parser.parse_args()

tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
enable(model, preset=args.preset)
read = tokenizer(args.document.read_text(encoding="utf-8"), truncation=True, max_length=args.tokens).input_ids
text = args.hidden + tokenizer.decode(read) + args.question
inputs = tokenizer(text, return_tensors="pt").to(model.device)
length = inputs.input_ids.shape[1]
cache = InnerQCache(model.config, preset=args.preset, max_cache_len=length + args.new_tokens)
# In chunks: the scores of a whole long prompt would take more memory than its cache.
out = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.new_tokens, prefill_chunk_size=512)
print(f"{length} tokens read, held in {cache.memory_bytes / 1e6:.2f} MB")
print(tokenizer.decode(out[0, length:]))
