"""Greedy tokens of a checkpoint in vLLM, and their time; runs in the environment of vLLM.

    python vllm_generate.py DIR NEW_TOKENS OPTIONS < PROMPTS.json

OPTIONS is json of more arguments of ``vllm.LLM``, PROMPTS.json a list of lists of token ids. Prints one json line:
tokens of every prompt alone and in a batch, the class that vLLM chose, seconds and number of tokens of the batch.
"""

import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams

folder, new_tokens, options = sys.argv[1:]
prompts = [{"prompt_token_ids": tokens} for tokens in json.load(sys.stdin)]
llm = LLM(
    model=folder,
    dtype="float32",
    skip_tokenizer_init=True,
    max_model_len=256,
    enforce_eager=True,
    disable_log_stats=True,
    **json.loads(options),
)
sampling = SamplingParams(temperature=0, max_tokens=int(new_tokens), ignore_eos=True, detokenize=False)


def generate(batch: list[dict]) -> list[list[int]]:
    """Greedy tokens of a batch of prompts."""
    return [list(output.outputs[0].token_ids) for output in llm.generate(batch, sampling, use_tqdm=False)]


alone = [tokens for prompt in prompts for tokens in generate([prompt])]
start = time.perf_counter()
together = generate(prompts)
seconds = time.perf_counter() - start
architecture = llm.llm_engine.model_config.architecture
tokens = sum(map(len, together))
print(json.dumps({"alone": alone, "together": together, "class": architecture, "seconds": seconds, "tokens": tokens}))
