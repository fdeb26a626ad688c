"""Tiny random models of every family, and their configurations."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 64

TINY_VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
}


TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = ["sliding_attention", "full_attention"] * 2
# Keys that the configurations of some classes lack, or compute.
UNSET = object()
_OLDER = dict.fromkeys(("num_key_value_heads", "head_dim", "intermediate_size"), UNSET)
_NO_POSITIONS = {"max_position_embeddings": UNSET}
_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
# Configurations of the other families, by model type; each with what sets it apart.
TINY_FAMILIES = {
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "layer_types": WINDOWS},
    "gemma2": {"num_key_value_heads": 2, "sliding_window": 8, "layer_types": WINDOWS, "query_pre_attn_scalar": 4},
    "gemma3_text": {"num_key_value_heads": 3, "sliding_window": 8, "layer_types": WINDOWS, "query_pre_attn_scalar": 4},
    "granite": {"num_key_value_heads": 2, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "phi3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24, "dropout": 0.0, "activation_function": "gelu"},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "bloom": {**_OLDER, **_NO_POSITIONS},
    "gpt2": {**_OLDER, **_NO_DROPOUT, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True},
}
# Families whose layers are made of the same parts, tested together in tests/integration/test_family_table.py.
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_WINDOWED = {**_GROUPED, "sliding_window": 8, "layer_types": WINDOWS}
_MIXTURE = {"num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    **_MIXTURE,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_chunk_size": 8}
_GRANITE_HYBRID: dict[str, Any] = {
    **_GROUPED,
    **_MAMBA,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "shared_intermediate_size": 40,
    "residual_multiplier": 0.7,
}
_JAMBA_HYBRID: dict[str, Any] = {**_GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}
_NEMOTRON_HYBRID: dict[str, Any] = {
    **_GROUPED,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
}
_GEMMA4: dict[str, Any] = {
    **_WINDOWED,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
}
_NEMOTRON_MIXTURE: dict[str, Any] = {
    **_NEMOTRON_HYBRID,
    **_MIXTURE,
    "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
FURTHER_FAMILIES = {
    "gemma": _GROUPED,
    "ministral": _WINDOWED,
    "ministral3": _GROUPED,
    "gemma4_text": {
        **_GEMMA4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "gemma4_unified_text": {
        **{key: value for key, value in _GEMMA4.items() if "per_layer" not in key},
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "olmo": {**_GROUPED, "clip_qkv": 5.0},
    "olmo3": _WINDOWED,
    "glm": {**_GROUPED, "attention_bias": True},
    "glm4": _GROUPED,
    "cohere": {**_GROUPED, "use_qk_norm": True},
    "cohere2": _WINDOWED,
    "exaone4": _WINDOWED,
    "seed_oss": _GROUPED,
    "hunyuan_v1_dense": _GROUPED,
    "ernie4_5": {**_GROUPED, "use_bias": True},
    "hyperclovax": {**_GROUPED, "attention_multiplier": 0.3},
    "cwm": _WINDOWED,
    "jais2": _GROUPED,
    "granite_swa": _WINDOWED,
    "helium": _GROUPED,
    "apertus": _GROUPED,
    "arcee": {**_GROUPED, "mlp_bias": True},
    "nemotron": _GROUPED,
    # Rotary embeddings of an even number of dimensions, which its attention takes for granted.
    "stablelm": {**_GROUPED, "use_qkv_bias": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    "llama4_text": {
        **_GROUPED,
        **_MIXTURE,
        "num_local_experts": 4,
        "moe_layers": [1, 3],
        "intermediate_size": 16,
        "intermediate_size_mlp": 40,
        "no_rope_layers": [1, 1, 0, 1],
    },
    "starcoder2": {**_GROUPED, "tie_word_embeddings": True},
    "phi": {**_GROUPED, "qk_layernorm": True},
    "persimmon": {"qk_layernorm": True},
    "gpt_neox": {"attention_bias": True},
    "codegen": {**_OLDER, **_NO_DROPOUT, "n_inner": 40, "rotary_dim": 2, "num_attention_heads": 8, "hidden_size": 32},
    "mpt": {**_OLDER, **_NO_POSITIONS, "use_cache": True},
    "falcon": {**_OLDER, "ffn_hidden_size": 40, "num_kv_heads": 2, "new_decoder_architecture": True},
    # Its number of kv heads follows from the key that it stores the heads under.
    "gpt_bigcode": {**_OLDER, **_NO_DROPOUT, "n_inner": 40, "n_head": 6},
    "gptj": {**_OLDER, **_NO_DROPOUT, "n_inner": 40, "rotary_dim": 2},
    "olmoe": {**_GROUPED, **_MIXTURE, "num_experts": 4, "norm_topk_prob": True},
    "qwen2_moe": {
        **_GROUPED,
        **_MIXTURE,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "granitemoe": {**_GROUPED, **_MIXTURE, "num_local_experts": 4, "residual_multiplier": 0.7},
    "phimoe": {**_GROUPED, **_MIXTURE, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "hunyuan_v1_moe": {**_GROUPED, "num_experts": 4, "moe_topk": [2, 2, 2, 2]},
    "ernie4_5_moe": {
        **_GROUPED,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_interval": 2,
        "use_bias": True,
    },
    "glm4_moe": {
        **_GROUPED,
        **_MIXTURE,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "n_shared_experts": 2,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "gpt_oss": {**_WINDOWED, **_MIXTURE, "num_local_experts": 4},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "n_shared_experts": 1},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1},
    "minicpm3": {key: value for key, value in _LATENT.items() if key.endswith(("_rank", "_dim"))},
    "qwen3_5_text": {**_GROUPED, **HYBRID, "attention_bias": True, "partial_rotary_factor": 0.5},
    "qwen3_next": {
        **_GROUPED,
        **HYBRID,
        **_MIXTURE,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {**_GROUPED, **HYBRID},
    "granitemoehybrid": {**_GRANITE_HYBRID, **_MIXTURE, "num_local_experts": 4, "intermediate_size": 16},
    "jamba": {**_JAMBA_HYBRID, **_MIXTURE, "num_experts": 4, "expert_layer_period": 4, "expert_layer_offset": 3},
    "nemotron_h": _NEMOTRON_MIXTURE,
    "falcon_h1": {**_GROUPED, **_MAMBA, "mamba_d_ssm": 48, "attention_out_multiplier": 0.8},
    "lfm2": {
        **_GROUPED,
        "layer_types": ["conv", "full_attention"] * 2,
        "intermediate_size": 48,
        "block_multiple_of": 8,
    },
}
# Other configurations of these families, each by a name that starts with its model type.
FURTHER_VARIANTS: dict[str, Any] = {
    "gemma4_text without experts": {
        **_GEMMA4,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "use_bidirectional_attention": "vision",
    },
    "gemma4_text of inputs by layer with experts": {
        **_GEMMA4,
        "hidden_size_per_layer_input": 6,
        "num_kv_shared_layers": 2,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    # The first two layers store keys and values, which the others reuse.
    "gemma4_text of inputs by layer": {
        **_GEMMA4,
        "hidden_size_per_layer_input": 6,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "granitemoehybrid without experts": {**_GRANITE_HYBRID, "num_local_experts": 0},
    "jamba without experts": {**_JAMBA_HYBRID, "num_experts": 1},
    "nemotron_h with latent experts": {**_NEMOTRON_MIXTURE, "moe_latent_size": 12, "mlp_bias": True},
    "nemotron_h without experts": {
        **_NEMOTRON_HYBRID,
        "layers_block_type": ["full_attention", "mlp", "linear_attention", "mlp"],
    },
}
_EXPERT_GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
# Mixtures whose routers choose among groups of experts, with two groups of four.
EXPERT_GROUPS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4_moe", "deepseek_v3", "nemotron_h"), _EXPERT_GROUPS),
    "deepseek_v2": {**_EXPERT_GROUPS, "topk_method": "group_limited_greedy"},
}
ALL_TINY = [*TINY_VARIANTS, *TINY_FAMILIES]


def make_tiny(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of 4 layers: a variant of LLaMA, or another family; large enough weights for every unit to matter.

    Some end in grouped-query attention, biases, tied embeddings or sliding windows.
    """
    families = {**TINY_FAMILIES, **FURTHER_FAMILIES, **FURTHER_VARIANTS}
    family = name.partition(" ")[0] if name in families else "llama"
    differences = families.get(name) or TINY_VARIANTS.get(name, {})
    fields = {**TINY, **differences, **overrides}
    config = AutoConfig.for_model(family, **{key: fields[key] for key in fields if differences.get(key) is not UNSET})
    torch.manual_seed(0)
    # The library's faster ways with experts have no fp64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        # Not model.to(dtype), which would round the rotary frequencies too; from_pretrained leaves them in fp32.
        parameter.data = parameter.data.to(dtype)
    scale_layers(model)
    return model.eval()


def scale_layers(model: PreTrainedModel) -> None:
    """Give the buffers that scale the outputs of Gemma 4's layers values of their own."""
    for index, (name, buffer) in enumerate(model.named_buffers()):
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7 + index / 100)


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Choose the attention of ``model``; skips the test where its family has no such one."""
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("the family has no sdpa attention")
    model.set_attn_implementation(implementation)
