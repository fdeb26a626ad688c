"""What llama.cpp's architectures express of a model, and what is refused."""

import pytest

from slim_utils.common.errors import UserError
from slim_utils.gguf_families import find_architecture, is_exportable, window_period
from tests.gguf_files import save_pruned
from tests.tiny_models import WINDOWS, make_tiny

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("olmo2", {"head_dim": 8}, r"heads that do not fill the hidden size .* llama\.cpp's olmo2; export the masked"),
        ("gemma2", {"layer_types": WINDOWS[:2] + WINDOWS[:1] * 2}, "these layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, "a model without final_logit_softcapping"),
        ("gemma", {"attention_bias": True}, r"attention_bias is not supported by llama\.cpp's gemma"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers other than every 4th"),
        ("ernie4_5", {}, r"use_bias is not supported by llama\.cpp's ernie4_5"),
        ("qwen3_moe", {}, "layers of experts and dense ones"),
        ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": False}, "a model without norm_topk_prob"),
        ("phi3", {"head_dim": 8, **PARTIAL}, "partial rotary embeddings"),
        ("gqa", {"rope_parameters": {**YARN, "truncate": False}}, "'yarn' with this truncate"),
        # The library truncates where the key is missing alone.
        ("gqa", {"rope_parameters": {**YARN, "truncate": None}}, "'yarn' with this truncate"),
    ],
)
def test_find_architecture_of_what_the_architecture_lacks_is_refused(model_type, overrides, message):
    config = make_tiny(model_type, **overrides).config
    with pytest.raises(UserError, match=message):
        find_architecture(config)
    assert not is_exportable(config)


def test_find_architecture_of_per_layer_shapes_names_what_to_do(tmp_path, tokenizer):
    for variant in ("qwen3", "olmo2"):
        config = save_pruned(tmp_path / variant, tokenizer, variant, False).config
        with pytest.raises(
            UserError, match=rf"per-layer shapes .* llama\.cpp's {variant}; prune with --uniform_shapes, or"
        ):
            find_architecture(config)


@pytest.mark.parametrize(
    ("pattern", "period"), [("sfsf", 2), ("ssfs", 3), ("ssss", 0), ("ffff", 1), ("sffs", None), ("fsfs", None)]
)
def test_window_period_is_that_of_full_attention(pattern, period):
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    config = make_tiny("gemma2").config
    config.layer_types = [kinds[letter] for letter in pattern]
    assert window_period(config) == period


def test_find_architecture_of_a_llama_with_yarn_is_llama():
    # The defaults, as some checkpoints write them.
    defaults = {"attention_factor": 1.0693147180559945, "beta_fast": 32.0, "beta_slow": 1, "mscale": 1.0}
    assert find_architecture(make_tiny("gqa", rope_parameters={**YARN, **defaults}).config).name == "LLAMA"
