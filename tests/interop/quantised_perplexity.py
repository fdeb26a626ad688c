"""Perplexity of a checkpoint with quantised weights; runs in the environment of the quantisers.

    python quantised_perplexity.py DIR KIND OUT < TOKENS.json

KIND is a key of ``KINDS``. TOKENS.json has two lists of lists of token ids of one length: ``calibration`` for GPTQ and
AWQ, and ``windows``. The quantised model is saved in OUT and loaded again. Prints one json line:

* ``fp32``, ``quantised``, ``reloaded``: perplexity of the checkpoint, the quantised model and the saved one, whose
  other weights and activations are fp32, which every CPU computes fast;
* ``tokens``: greedy tokens of the saved model after the first window;
* ``bytes``: sizes of the files with weights, of the checkpoint and of OUT.
"""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQ_MAPPING_REGISTRY, AWQModifier, default_mappings
from llmcompressor.pipelines.cache import IntermediatesCache
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

NEW_TOKENS = 16
# Columns that share a scale in int4.
GROUP = 32


def load(folder: str, **options: Any) -> PreTrainedModel:
    """The model with its own code where it has some."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True, **options)
    return model.eval()


def configured(
    config: TorchAoConfig | BitsAndBytesConfig, folder: str, calibration: list[list[int]]
) -> PreTrainedModel:
    """The model quantised while it is loaded, without data."""
    return load(folder, quantization_config=config)


def compressed(
    recipe: Callable[[PreTrainedModel], list[Modifier]], folder: str, calibration: list[list[int]]
) -> PreTrainedModel:
    """The model quantised by llm-compressor on the calibration windows."""
    model = load(folder)
    masks = [[1] * len(window) for window in calibration]
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": calibration, "attention_mask": masks}),
        recipe=recipe(model),
        max_seq_length=len(calibration[0]),
        num_calibration_samples=len(calibration),
        trust_remote_code_model=True,
    )
    return model


def gptq(model: PreTrainedModel) -> list[Modifier]:
    """Recipe of GPTQ."""
    return [GPTQModifier(**GROUPS)]


def awq(model: PreTrainedModel) -> list[Modifier]:
    """Recipe of AWQ with the mappings of the stock class; llm-compressor finds them by the name of the class."""
    if not torch.accelerator.is_available():
        # Pinned memory, which the modifier uses in any case, needs an accelerator.
        IntermediatesCache.pin_memory = lambda *_: None
    mappings = AWQ_MAPPING_REGISTRY.get(type(model).__name__.removeprefix("Slim"), default_mappings)
    # Half the usual number of scales is tried, each on all calibration windows.
    return [AWQModifier(mappings=mappings, n_grid=10), QuantizationModifier(**GROUPS)]


SCHEME = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP)
)
GROUPS = {"config_groups": {"group_0": SCHEME}, "ignore": ["lm_head"]}
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
KINDS = {
    "torchao int8": partial(configured, TorchAoConfig(Int8WeightOnlyConfig())),
    "torchao int4": partial(configured, TorchAoConfig(INT4)),
    "bitsandbytes int8": partial(configured, BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes nf4": partial(configured, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "llm-compressor GPTQ": partial(compressed, gptq),
    "llm-compressor AWQ": partial(compressed, awq),
}


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Perplexity of the targets of all windows."""
    logits = model(windows).logits[:, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def num_bytes(folder: str) -> int:
    """Size of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def main(folder: str, kind: str, out: str) -> None:
    """Quantise, measure, save and load again."""
    given = json.load(sys.stdin)
    windows = torch.tensor(given["windows"])
    result: dict[str, Any] = {"fp32": perplexity(load(folder), windows)}
    model = KINDS[kind](folder, given["calibration"])
    # bitsandbytes repacks weights of NF4 when they first run on a CPU with AVX512-BF16, and would save wrong scales.
    model.save_pretrained(out)
    result["quantised"] = perplexity(model, windows)
    saved = load(out)
    result["reloaded"] = perplexity(saved, windows)
    prompt = windows[:1]
    generated = saved.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    result["tokens"] = generated[0, prompt.shape[1] :].tolist()
    result["bytes"] = [num_bytes(folder), num_bytes(out)]
    print(json.dumps(result))


main(*sys.argv[1:])
