"""Greedy tokens of a checkpoint in Transformers, and their time; all prompts have the same length.

    python transformers_generate.py DIR NEW_TOKENS < PROMPTS.json

PROMPTS.json is one line, a list of lists of token ids. Prints one json line: together, seconds and tokens of the batch.
Each further line of the input generates for the batch again and prints the same.
"""

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

folder, new_tokens = sys.argv[1], int(sys.argv[2])
prompts = torch.tensor(json.loads(sys.stdin.readline()))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0}
model.generate(prompts[:1], attention_mask=torch.ones_like(prompts[:1]), **options)


def timed_batch() -> dict[str, Any]:
    """New tokens of all prompts, and their seconds and number."""
    start = time.perf_counter()
    output = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    seconds = time.perf_counter() - start
    new = output[:, prompts.shape[1] :]
    return {"together": new.tolist(), "seconds": seconds, "tokens": new.numel()}


print(json.dumps(timed_batch()), flush=True)
for _ in sys.stdin:
    print(json.dumps(timed_batch()), flush=True)
