"""Checkpoints in vLLM: greedy tokens of single prompts and of a batch against Transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slim_utils.families import SERVED_FAMILIES, find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.output.model_card import vllm_options
from slim_utils.params_remove import shrink
from tests.interop.common import NEW_TOKENS, PROMPTS, ROOT, SHAPES, engine, greedy_tokens, smollm2

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
# Both compute in fp32, in a different order.
NEAR_TIE = 1e-3
TOKEN_PROMPTS = [[5, 9, 17, 33], [100, 20, 30], list(range(7, 40)), [200]]

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="run scripts/test_serving.sh"),
]


def compare(folder: Path, prompts: list[list[int]], architecture: str) -> None:
    """Compare the tokens of vLLM, with the options of the model card, with those of Transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [greedy_tokens(model, prompt, NEAR_TIE) for prompt in prompts]
    options = json.dumps(vllm_options(model.config))
    got = engine(PYTHON, "vllm_generate.py", folder, NEW_TOKENS, options, stdin=json.dumps(prompts))
    assert got["class"] == architecture
    for mode in ("alone", "together"):
        for tokens, expected_tokens in zip(got[mode], expected, strict=True):
            assert tokens[: len(expected_tokens)] == expected_tokens
    # Near ties are rare enough for a meaningful comparison.
    assert sum(map(len, expected)) > 0.7 * NEW_TOKENS * len(prompts)


def pruned_model(model_type: str, uniform_shapes: bool):
    """A random pruned model of a family, with per-layer heads, kv heads and columns, or with uniform layers."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Norms stay at 1, so that logits are far enough apart.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    masks = []
    for index, shape in enumerate(layer_shapes(config)):
        columns = list(range(0, 192, 2)) if uniform_shapes else [c for c in range(192) if c % (index + 2)]
        heads = [head for head in range(8) if head % 4 != index]
        if index == 1 and not uniform_shapes:
            masks.append(LayerMask.from_groups(shape, [1], columns))
        else:
            masks.append(LayerMask.from_heads(shape, heads, columns))
    return shrink(model, find_family(config), masks, uniform_shapes)


@pytest.mark.parametrize("shapes", ["per_layer", "stock"])
@pytest.mark.parametrize("model_type", SERVED_FAMILIES)
def test_vllm_generates_the_greedy_tokens_of_transformers(model_type, shapes, tmp_path):
    model = pruned_model(model_type, shapes == "stock")
    model.save_pretrained(tmp_path)
    native = {"llama": "MistralForCausalLM", "qwen2": "LlamaForCausalLM"}.get(model_type, type(model).__name__)
    compare(tmp_path, TOKEN_PROMPTS, "TransformersForCausalLM" if shapes == "per_layer" else native)


@pytest.mark.parametrize("shape", SHAPES)
def test_vllm_generates_the_greedy_tokens_of_smollm2(shape, tmp_path):
    folder = smollm2(shape, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    per_layer = shape in ("kv groups", "query heads")
    architecture = "TransformersForCausalLM" if per_layer else "LlamaForCausalLM"
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    compare(folder, prompts, architecture)
