"""Run with llama.cpp's own environment: greedy text of a GGUF file, and tokens a second.

    python llama_cpp_generate.py MODEL.gguf NEW_TOKENS < PROMPTS.json

PROMPTS.json is a list of texts or of lists of token ids, which are all answered at once. Prints one json line: texts,
seconds and tokens.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

path, new_tokens = sys.argv[1:]
prompts = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.n_ctx = 512 * len(prompts)
parameters.n_parallel = len(prompts)
parameters.verbosity = -1
server = xllamacpp.Server(parameters)


def complete(prompt: str | list[int]) -> dict[str, Any]:
    """Greedy completion of one prompt."""
    request = {"prompt": prompt, "n_predict": int(new_tokens), "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    answer = server.handle_completions(request | {"ignore_eos": True})
    return answer if isinstance(answer, dict) else json.loads(answer)


start = time.perf_counter()
with ThreadPoolExecutor(len(prompts)) as pool:
    answers = list(pool.map(complete, prompts))
seconds = time.perf_counter() - start
tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
texts = [answer["choices"][0]["text"] for answer in answers]
print(json.dumps({"texts": texts, "seconds": seconds, "tokens": tokens}))
