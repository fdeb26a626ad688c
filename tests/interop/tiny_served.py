"""Tiny random pruned models of the families that vLLM serves."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink

WINDOWS = ["sliding_attention", "full_attention"] * 2
# What sets a family apart, by model type; windows are shorter than the prompts.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "layer_types": WINDOWS, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 8, "layer_types": WINDOWS, "query_pre_attn_scalar": 32},
    "olmo3": {
        "sliding_window": 8,
        "layer_types": WINDOWS,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "granite": {"attention_multiplier": 0.1, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
}
# Families that scale their embeddings by the root of the hidden size.
SCALED_EMBEDDINGS = ("gemma", "gemma2", "gemma3_text")
# Heads of every kv group that each layer loses.
REMOVED_HEADS = ({0}, {1, 2}, {2}, {0, 3})


def pruned_model(model_type: str, shape: str) -> PreTrainedModel:
    """A random pruned model of 4 layers.

    Args:
        model_type: model type of the family.
        shape: ``stock`` for uniform layers; ``query heads`` for numbers of heads and columns that differ by layer;
            ``kv groups`` for key/value heads that differ too; ``whole experts`` for :func:`without_experts`.
    """
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
        pad_token_id=0,
        # Greedy generation never stops.
        eos_token_id=None,
        **DIFFERENCES.get(model_type, {}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter in model.parameters():
        # Norms stay at 1, so that logits are far enough apart.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if model_type in SCALED_EMBEDDINGS:
        # Larger ones, which are also the head, would make the model repeat its input.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    if shape == "whole experts":
        return without_experts(model.eval())
    masks = []
    for index, layer in enumerate(layer_shapes(config)):
        width = layer.ffn_width
        # Transformers wants experts of multiples of 8 columns.
        kept = [c for c in range(width) if (c // 8) % (2 if shape == "stock" else index + 2)]
        columns = [expert * width + column for expert in range(layer.num_ffns) for column in kept]
        removed = REMOVED_HEADS[index]
        if shape == "stock":
            # Heads of Gemma 2 and 3 have to divide the hidden size.
            removed = {index, (index + 1) % 4} if model_type in ("gemma2", "gemma3_text") else {index}
        if shape == "kv groups" and index == 1:
            masks.append(LayerMask.from_groups(layer, [1], columns))
        else:
            masks.append(LayerMask.from_heads(layer, [head for head in range(8) if head % 4 not in removed], columns))
    return shrink(model.eval(), find_family(config), masks, shape == "stock")


def without_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model without one expert of every layer that has some, a different one in each."""
    masks = []
    for index, layer in enumerate(layer_shapes(model.config)):
        removed = range(index * layer.ffn_width, (index + 1) * layer.ffn_width) if layer.num_experts else ()
        columns = [column for column in range(layer.num_columns) if column not in removed]
        masks.append(LayerMask.from_heads(layer, list(range(layer.num_heads)), columns))
    return shrink(model, find_family(model.config), masks, uniform_shapes=True)
