"""Token ids of texts with the tokenizer of a GGUF file; runs in the environment of llama.cpp.

    python llama_cpp_tokenize.py MODEL.gguf < TEXTS.json

TEXTS.json is a list of texts. Prints one json line: ids, a list per text, with special tokens.
"""

import json
import sys
import urllib.request

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = 64
parameters.warmup = False
parameters.verbosity = -1
server = xllamacpp.Server(parameters)


def tokenize(text: str) -> list[int]:
    """Ids of one text."""
    body = json.dumps({"content": text, "add_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["tokens"]


print(json.dumps({"ids": [tokenize(text) for text in json.load(sys.stdin)]}))
