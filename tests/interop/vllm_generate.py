"""Greedy tokens of a checkpoint in vLLM, and their time; runs in the environment of vLLM.

    python vllm_generate.py DIR NEW_TOKENS OPTIONS [ADAPTER] < PROMPTS.json

OPTIONS is json of more arguments of ``vllm.LLM``, ADAPTER a folder of a LoRA adapter, PROMPTS.json one line, a list of
lists of token ids. Prints one json line:

* ``alone``, ``together``: tokens of every prompt alone and in a batch;
* ``adapted``: of the batch with the LoRA adapter, if one is given;
* ``cached``: tokens of each prompt of the batch that came from the prefix cache;
* ``class``: architecture that vLLM chose;
* ``seconds``, ``tokens``: of the batch.

Each further line of the input generates for the batch again and prints ``seconds`` and ``tokens``.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    """Greedy tokens of every prompt."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def timed(generate: Callable[[], list[RequestOutput]]) -> tuple[list[RequestOutput], dict[str, Any]]:
    """Outputs of a batch, and its seconds and tokens."""
    start = time.perf_counter()
    outputs = generate()
    seconds = time.perf_counter() - start
    return outputs, {"seconds": seconds, "tokens": sum(map(len, tokens(outputs)))}


def main(folder: str, new_tokens: str, options: str, *adapters: str) -> None:
    """Read prompts, generate, and print."""
    prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(sys.stdin.readline())]
    defaults = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "enable_lora": bool(adapters)}
    llm = LLM(model=folder, skip_tokenizer_init=True, disable_log_stats=True, **defaults | json.loads(options))
    sampling = SamplingParams(temperature=0, max_tokens=int(new_tokens), ignore_eos=True, detokenize=False)
    generate = partial(llm.generate, sampling_params=sampling, use_tqdm=False)
    batch = partial(generate, prompts)
    result: dict[str, Any] = {"alone": [tokens(generate([prompt]))[0] for prompt in prompts]}
    outputs, timing = timed(batch)
    result |= timing | {"together": tokens(outputs), "cached": [output.num_cached_tokens for output in outputs]}
    if adapters:
        result["adapted"] = tokens(batch(lora_request=LoRARequest("adapter", 1, adapters[0])))
    print(json.dumps(result | {"class": llm.llm_engine.model_config.architecture}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(batch)[1]), flush=True)


# Workers of tensor parallelism import this file.
if __name__ == "__main__":
    main(*sys.argv[1:])
