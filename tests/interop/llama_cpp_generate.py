"""Greedy text of a GGUF file, and its time; runs in the environment of llama.cpp.

    python llama_cpp_generate.py MODEL.gguf NEW_TOKENS < PROMPTS.json

PROMPTS.json is one line, a list of texts or of lists of token ids, completed in one batch. Prints one json line: texts,
seconds and tokens. Each further line of the input completes the batch again and prints the same. OMP_NUM_THREADS sets
the number of threads, which is that of the cores without it.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

path, new_tokens = sys.argv[1:]
prompts = json.loads(sys.stdin.readline())
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.n_ctx = 512 * len(prompts)
parameters.n_parallel = len(prompts)
# llama.cpp's threads wait for one another in a loop, which other work on the machine makes very slow.
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", -1))
parameters.verbosity = -1
server = xllamacpp.Server(parameters)


def complete(prompt: str | list[int]) -> dict[str, Any]:
    """Greedy completion of one prompt."""
    request = {"prompt": prompt, "n_predict": int(new_tokens), "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    response = server.handle_completions(request | {"ignore_eos": True})
    return response if isinstance(response, dict) else json.loads(response)


def timed_batch() -> dict[str, Any]:
    """Completions of all prompts, and their seconds and tokens."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        responses = list(pool.map(complete, prompts))
    seconds = time.perf_counter() - start
    tokens = sum(response["usage"]["completion_tokens"] for response in responses)
    return {"texts": [response["choices"][0]["text"] for response in responses], "seconds": seconds, "tokens": tokens}


print(json.dumps(timed_batch()), flush=True)
for _ in sys.stdin:
    print(json.dumps(timed_batch()), flush=True)
