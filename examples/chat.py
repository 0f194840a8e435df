"""A conversation that is saved after every turn: started again, it goes on without reading anything twice.

    python examples/chat.py "def add(a, b):" "def multiply(a, b):"

Each argument is a turn, taken as it is: put your model's chat template around it.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from innerq_compile import InnerQCache, enable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("turns", nargs="+")
parser.add_argument("--model", default="innerq_compile/demo/model")
parser.add_argument("--folder", type=Path, default=Path("chat"), help="where the conversation is kept")
parser.add_argument("--new-tokens", type=int, default=40)
args = parser.parse_args()

tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
enable(model)
args.folder.mkdir(parents=True, exist_ok=True)
saved, transcript = args.folder / "cache.safetensors", args.folder / "tokens.json"
cache, tokens = InnerQCache(model.config), []
if saved.exists():
    cache, tokens = InnerQCache.load(saved, model.config, device=model.device), json.loads(transcript.read_text())

for turn in args.turns:
    ids = torch.tensor([[*tokens, *tokenizer.encode(turn)]], device=model.device)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=args.new_tokens)
    tokens = out[0].tolist()
    cache.save(saved)
    transcript.write_text(json.dumps(tokens))
    print(f">>> {turn}\n{tokenizer.decode(tokens[ids.shape[1] :])}")
