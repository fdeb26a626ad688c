"""Checkpoints in vLLM: greedy tokens of single prompts and of a batch against Transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_utils.families import SERVED_FAMILIES, SERVED_MIXTURES, SERVED_STOCK
from slim_utils.output.model_card import vllm_options
from tests.interop.common import NEW_TOKENS, PROMPTS, ROOT, SHAPES, engine, greedy_tokens, smollm2
from tests.interop.served import record_served
from tests.interop.tiny_served import pruned_model

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
BACKEND = "vLLM, Transformers backend"
# Both compute in fp32, in a different order.
NEAR_TIE = 1e-3
# vLLM rounds activations and logits to bf16: at most this much below the best logit of Transformers in fp32.
BF16_MARGIN = 0.5
# Served without the plugin in stock shapes alone.
STOCK_ALONE = [name for name in SERVED_STOCK if name not in (*SERVED_FAMILIES, *SERVED_MIXTURES)]
TOKEN_PROMPTS = [[5, 9, 17, 33], [100, 20, 30], list(range(7, 40)), [200]]

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="run scripts/test_serving.sh"),
]


def compare(
    folder: Path,
    prompts: list[list[int]],
    architecture: str,
    options: dict[str, Any] | None = None,
    adapter: Path | None = None,
    plugin: Path | None = None,
) -> dict[str, Any]:
    """Compare the greedy tokens of vLLM with those of Transformers, in fp32.

    Args:
        folder: checkpoint.
        prompts: token ids.
        architecture: expected class in vLLM.
        options: arguments of ``vllm.LLM``; those of the model card if omitted.
        adapter: folder of a LoRA adapter, with which the tokens are compared too.
        plugin: folder of the plugin, if it shall be there.

    Returns:
        What the script of vLLM printed.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = {"alone": [greedy_tokens(model, prompt, NEAR_TIE) for prompt in prompts]}
    expected["together"] = expected["alone"]
    if adapter:
        adapted = PeftModel.from_pretrained(model, adapter)
        expected["adapted"] = [greedy_tokens(adapted, prompt, NEAR_TIE) for prompt in prompts]
        assert expected["adapted"] != expected["alone"]
    options = vllm_options(model.config) if options is None else options
    adapters = [adapter] if adapter else []
    argv = [folder, NEW_TOKENS, json.dumps(options), *adapters]
    got = engine(PYTHON, "vllm_generate.py", *argv, stdin=json.dumps(prompts), plugin=plugin)
    assert got["class"] == architecture
    for mode, outputs in expected.items():
        for tokens, expected_tokens in zip(got[mode], outputs, strict=True):
            assert tokens[: len(expected_tokens)] == expected_tokens, mode
        # Near ties are rare enough for a meaningful comparison.
        assert sum(map(len, outputs)) > 0.7 * NEW_TOKENS * len(prompts)
    return got


@pytest.mark.parametrize("shape", ["query heads", "kv groups", "stock"])
@pytest.mark.parametrize("model_type", SERVED_FAMILIES)
def test_vllm_generates_the_greedy_tokens_of_transformers(model_type, shape, tmp_path):
    model = pruned_model(model_type, shape)
    model.save_pretrained(tmp_path)
    native = {"llama": "MistralForCausalLM", "qwen2": "LlamaForCausalLM"}.get(model_type, type(model).__name__)
    compare(tmp_path, TOKEN_PROMPTS, native if shape == "stock" else "TransformersForCausalLM")
    record_served("vLLM" if shape == "stock" else BACKEND, model_type, shape, "fp32")


@pytest.mark.parametrize("model_type", STOCK_ALONE)
def test_vllm_generates_the_greedy_tokens_of_stock_checkpoints(model_type, tmp_path):
    model = pruned_model(model_type, "stock")
    model.save_pretrained(tmp_path)
    assert vllm_options(model.config) == {}
    compare(tmp_path, TOKEN_PROMPTS, type(model).__name__)
    record_served("vLLM", model_type, "stock", "fp32")


@pytest.mark.parametrize("shape", SHAPES)
def test_vllm_generates_the_greedy_tokens_of_smollm2(shape, tmp_path):
    folder = smollm2(shape, tmp_path / "out")
    per_layer = shape in ("kv groups", "query heads")
    architecture = "TransformersForCausalLM" if per_layer else "LlamaForCausalLM"
    compare(folder, text_prompts(folder), architecture)
    record_served(BACKEND if per_layer else "vLLM", "llama", shape, "fp32")


def text_prompts(folder: Path) -> list[list[int]]:
    """Token ids of the common prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]
