"""Log probabilities of all tokens after contexts of token ids; runs in the environment of llama.cpp.

    python llama_cpp_logprobs.py CONTEXTS.json MODEL.gguf ...

CONTEXTS.json is a list of lists of token ids. Prints one json line: for every model, a list per context of the log
probabilities in order of the ids, or the error with which it does not load. Keys and values are cached in fp32.
"""

import json
import sys
from pathlib import Path

import xllamacpp

EVERY_TOKEN = 1_000_000


def log_probabilities(path: str, contexts: list[list[int]]) -> list[list[float]]:
    """Log probabilities of all tokens after each context."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup = False
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    lists = []
    for context in contexts:
        request = {"prompt": context, "n_predict": 1, "logprobs": EVERY_TOKEN, "cache_prompt": False}
        response = server.handle_completions(request | {"ignore_eos": False})
        response = response if isinstance(response, dict) else json.loads(response)
        (content,) = response["choices"][0]["logprobs"]["content"]
        lists.append([entry["logprob"] for entry in sorted(content["top_logprobs"], key=lambda entry: entry["id"])])
    return lists


def result(path: str, contexts: list[list[int]]) -> list[list[float]] | str:
    """Log probabilities of a model, or its error."""
    try:
        return log_probabilities(path, contexts)
    except RuntimeError as error:
        return str(error)


contexts = json.loads(Path(sys.argv[1]).read_text())
print(json.dumps({path: result(path, contexts) for path in sys.argv[2:]}))
