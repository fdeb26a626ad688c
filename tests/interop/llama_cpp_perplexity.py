"""Perplexity of a GGUF file on windows of token ids; runs in the environment of llama.cpp.

    python llama_cpp_perplexity.py MODEL.gguf < WINDOWS.json

WINDOWS.json is a list of lists of token ids. Every target is a separate request for the probabilities of all tokens;
its context is cached. OMP_NUM_THREADS sets the number of threads. Prints one json line: perplexity, targets.
"""

import json
import math
import os
import sys

import xllamacpp

windows = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = 512
parameters.n_parallel = 1
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", -1))
parameters.warmup = False
parameters.verbosity = -1
server = xllamacpp.Server(parameters)
EVERY_TOKEN = 1_000_000


def loss(context: list[int], target: int) -> float:
    """Negative log-likelihood of ``target`` after ``context``."""
    request = {"prompt": context, "n_predict": 1, "logprobs": EVERY_TOKEN, "cache_prompt": True, "ignore_eos": True}
    response = server.handle_completions(request)
    response = response if isinstance(response, dict) else json.loads(response)
    (content,) = response["choices"][0]["logprobs"]["content"]
    return -next(entry["logprob"] for entry in content["top_logprobs"] if entry["id"] == target)


losses = [loss(window[:i], window[i]) for window in windows for i in range(1, len(window))]
print(json.dumps({"perplexity": math.exp(sum(losses) / len(losses)), "targets": len(losses)}))
