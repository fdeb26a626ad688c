"""Run with llama.cpp's own environment: perplexity of a GGUF file on windows of token ids.

    python llama_cpp_perplexity.py MODEL.gguf < WINDOWS.json

WINDOWS.json is a list of lists of token ids. Each token is asked for by itself, the probabilities of all tokens being
given; what came before it stays cached. Prints one json line: perplexity, targets.
"""

import json
import math
import sys

import xllamacpp

windows = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = 512
parameters.n_parallel = 1
parameters.warmup = False
parameters.verbosity = -1
server = xllamacpp.Server(parameters)
EVERY_TOKEN = 1_000_000


def loss(context: list[int], target: int) -> float:
    """Negative log-likelihood of ``target`` after ``context``."""
    request = {"prompt": context, "n_predict": 1, "logprobs": EVERY_TOKEN, "cache_prompt": True, "ignore_eos": True}
    answer = server.handle_completions(request)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    (content,) = answer["choices"][0]["logprobs"]["content"]
    return -next(entry["logprob"] for entry in content["top_logprobs"] if entry["id"] == target)


losses = [loss(window[:i], window[i]) for window in windows for i in range(1, len(window))]
print(json.dumps({"perplexity": math.exp(sum(losses) / len(losses)), "targets": len(losses)}))
