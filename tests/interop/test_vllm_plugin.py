"""Checkpoints with per-layer shapes in vLLM with the plugin: greedy tokens against Transformers."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.serving_speed import install_plugin
from slim_utils.families import PLUGIN_FAMILIES
from slim_utils.output.model_card import vllm_options
from tests.interop.common import NEW_TOKENS, engine, run_engine, smollm2
from tests.interop.served import record_served
from tests.interop.test_vllm import (  # noqa: F401 - pytestmark marks this file too
    BACKEND,
    BF16_MARGIN,
    PYTHON,
    TOKEN_PROMPTS,
    compare,
    pytestmark,
    text_prompts,
)
from tests.interop.tiny_served import pruned_model

ENGINE = "vLLM, plugin"
# Longer than a chunk of the prefill and than several blocks of the cache, with a common beginning.
CHUNK, BLOCK = 64, 32
LONG_PROMPTS = [[*range(3, 83), *tail] for tail in ([90, 91], [100, 7, 5], [200], [10, 11, 12, 13])]


@pytest.fixture(scope="session")
def plugin(tmp_path_factory) -> Path:
    """Folder of the installed plugin, apart from the environment of vLLM."""
    return install_plugin(PYTHON, tmp_path_factory.mktemp("plugin"))


def save_adapter(model: torch.nn.Module, folder: Path) -> Path:
    """Save a random LoRA adapter of all linear maps in the decoder layers."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", PLUGIN_FAMILIES)
def test_plugin_generates_the_greedy_tokens_of_transformers(model_type, tmp_path, plugin):
    model = pruned_model(model_type, "query heads")
    model.save_pretrained(tmp_path)
    compare(tmp_path, TOKEN_PROMPTS, type(model).__name__, {}, plugin=plugin)
    record_served(ENGINE, model_type, "query heads", "fp32")


@pytest.mark.parametrize("model_type", PLUGIN_FAMILIES)
def test_plugin_with_prefix_cache_chunked_prefill_and_adapter_generates_the_same(model_type, tmp_path, plugin):
    model = pruned_model(model_type, "kv groups")
    model.save_pretrained(tmp_path / "model")
    # On a CPU, vLLM has no kernels for mixtures of experts with adapters.
    adapter = None if hasattr(model.config, "num_experts_per_tok") else save_adapter(model, tmp_path / "adapter")
    options = {"enable_prefix_caching": True, "block_size": BLOCK, "max_lora_rank": 8, "max_num_seqs": 4}
    options |= {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK}
    got = compare(tmp_path / "model", LONG_PROMPTS, type(model).__name__, options, adapter=adapter, plugin=plugin)
    assert min(got["cached"]) >= BLOCK
    record_served(ENGINE, model_type, "kv groups", "fp32")
    if adapter:
        record_served(ENGINE, model_type, "with LoRA adapter", "fp32")


def test_plugin_norms_over_the_heads_of_two_devices(tmp_path, plugin, monkeypatch):
    # Else every process wants a NUMA node.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = pruned_model("olmo2", "query heads")
    model.save_pretrained(tmp_path)
    compare(tmp_path, TOKEN_PROMPTS, type(model).__name__, {"tensor_parallel_size": 2}, plugin=plugin)


@pytest.mark.parametrize("shape", ["query heads", "kv groups"])
def test_plugin_generates_the_greedy_tokens_of_smollm2(shape, tmp_path, plugin):
    folder = smollm2(shape, tmp_path / "out")
    compare(folder, text_prompts(folder), "SlimLlamaForCausalLM", {}, plugin=plugin)
    record_served(ENGINE, "llama", shape, "fp32")


@torch.no_grad()
def test_plugin_in_bf16_generates_tokens_near_the_best_logits_of_transformers(tmp_path, plugin):
    folder = smollm2("kv groups", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    prompts = text_prompts(folder)
    argv = [folder, NEW_TOKENS, json.dumps({"dtype": "bfloat16"})]
    got = engine(PYTHON, "vllm_generate.py", *argv, stdin=json.dumps(prompts), plugin=plugin)
    for prompt, tokens in zip(prompts, got["together"], strict=True):
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        below = logits.max(-1).values - logits[range(NEW_TOKENS), tokens]
        assert below.max() < BF16_MARGIN
    record_served(ENGINE, "llama", "kv groups", "bf16")


def test_backend_beside_the_plugin_is_still_chosen_by_its_flags(tmp_path, plugin):
    model = pruned_model("llama", "kv groups")
    model.save_pretrained(tmp_path)
    compare(tmp_path, TOKEN_PROMPTS, "TransformersForCausalLM", vllm_options(model.config), plugin=plugin)
    record_served(BACKEND, "llama", "kv groups", "fp32")


def test_plugin_refuses_tensor_parallelism_that_does_not_divide_a_layer(tmp_path, plugin):
    pruned_model("llama", "query heads").save_pretrained(tmp_path)
    argv = [tmp_path, 1, json.dumps({"tensor_parallel_size": 4})]
    process = run_engine(PYTHON, "vllm_generate.py", *argv, stdin="[[1]]", plugin=plugin)
    message = "--tensor-parallel-size 4 does not divide the 6 heads of layer 0; use --tensor-parallel-size 2, or prune"
    assert process.returncode != 0 and message in process.stderr
