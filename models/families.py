"""Table of model families. A new family is one row."""

from __future__ import annotations

from typing import Any

from models.family import (
    COLUMNS,
    GATED_HEADS,
    HEADS,
    HEADS_PER_GROUP,
    KV_HEADS,
    LATENT_KEY_VALUES,
    LATENT_QUERIES,
    QKV,
    SHARED_COLUMNS,
    ExpertLayout,
    Family,
)


def row(base_type: str, name: str, **differences: Any) -> Family:
    """Return the row of model type ``base_type``, whose classes are called ``name``; other fields are LLaMA's."""
    classes = {
        "config_class": f"{name}Config",
        "model_class": f"{name}Model",
        "causal_class": f"{name}ForCausalLM",
    }
    return Family(**{"base_type": base_type, "slim_type": f"slim_{base_type}", "name": name, **classes, **differences})


_QK_NORMS_OVER_HEADS = (("self_attn.q_norm", HEADS), ("self_attn.k_norm", KV_HEADS))
_FUSED_GATE_UP = (("mlp.gate_up_proj", (COLUMNS, COLUMNS)),)
_FEED_FORWARD = (("feed_forward.gate_proj", (COLUMNS,)), ("feed_forward.up_proj", (COLUMNS,)))
_UP_ALONE = (("mlp.up_proj", (COLUMNS,)),)
_LATENT_ROWS = (
    ("self_attn.q_proj", (LATENT_QUERIES,)),
    ("self_attn.q_b_proj", (LATENT_QUERIES,)),
    ("self_attn.kv_b_proj", (LATENT_KEY_VALUES,)),
)
_GATED_QUERIES = (
    ("self_attn.q_proj", (GATED_HEADS,)),
    ("self_attn.k_proj", (KV_HEADS,)),
    ("self_attn.v_proj", (KV_HEADS,)),
)
_ROUTED_EXPERTS = {
    "expert_columns_key": "moe_intermediate_size",
    "num_experts_key": "n_routed_experts",
    "shared_expert": "mlp.shared_experts",
    "shared_count_key": "n_shared_experts",
}
# Experts are chosen by corrected scores, of the best groups by their two best experts.
_CORRECTED_SCORES = {
    "router_tensors": (("weight", 0), ("e_score_correction_bias", 0)),
    "fewest_experts": 2,
}
_GATED_SHARED_EXPERT = {
    "expert_columns_key": "moe_intermediate_size",
    "shared_expert": "mlp.shared_expert",
    "shared_gate": "mlp.shared_expert_gate",
    "shared_columns_key": "shared_expert_intermediate_size",
}
_GRANITE_EXPERTS = {
    "experts": "block_sparse_moe.experts",
    "expert_columns_key": "intermediate_size",
    "num_experts_key": "num_local_experts",
    "router": "block_sparse_moe.router",
}
_PER_HEAD_NORMS = (("self_attn.q_norm.weight", HEADS), ("self_attn.k_norm.weight", KV_HEADS))

ROWS = (
    row("llama", "Llama"),
    row("smollm3", "SmolLM3"),
    row("mistral", "Mistral"),
    row("qwen2", "Qwen2"),
    row("qwen3", "Qwen3"),
    row("gemma2", "Gemma2"),
    row(
        "gemma3_text",
        "Gemma3",
        slim_type="slim_gemma3",
        config_class="Gemma3TextConfig",
        model_class="Gemma3TextModel",
    ),
    row("olmo2", "Olmo2", head_norms=_QK_NORMS_OVER_HEADS),
    row("granite", "Granite"),
    row(
        "phi3",
        "Phi3",
        attention_rows=(("self_attn.qkv_proj", (HEADS, KV_HEADS, KV_HEADS)),),
        mlp_rows=_FUSED_GATE_UP,
    ),
    row(
        "opt",
        "OPT",
        layers="model.decoder.layers",
        attention_out="self_attn.out_proj",
        attention_rows=(
            ("self_attn.q_proj", (HEADS,)),
            ("self_attn.k_proj", (HEADS,)),
            ("self_attn.v_proj", (HEADS,)),
        ),
        mlp_out="fc2",
        mlp_rows=(("fc1", (COLUMNS,)),),
        columns_key="ffn_dim",
        heads_fill_hidden=True,
        head_counts=(("self_attn.num_heads", HEADS),),
    ),
    row("gemma", "Gemma"),
    row("ministral", "Ministral"),
    row("ministral3", "Ministral3"),
    row("olmo", "Olmo"),
    row("olmo3", "Olmo3", head_norms=_QK_NORMS_OVER_HEADS),
    row("glm", "Glm", mlp_rows=_FUSED_GATE_UP),
    row("glm4", "Glm4", mlp_rows=_FUSED_GATE_UP),
    row("cohere", "Cohere", head_parameters=_PER_HEAD_NORMS),
    row("cohere2", "Cohere2"),
    row("exaone4", "Exaone4"),
    row("seed_oss", "SeedOss"),
    row("hunyuan_v1_dense", "HunYuanDenseV1"),
    row("ernie4_5", "Ernie4_5"),
    row("hyperclovax", "HyperCLOVAX"),
    row("cwm", "Cwm"),
    row("jais2", "Jais2", mlp_rows=_UP_ALONE),
    row("granite_swa", "GraniteSWA", head_parameters=(("self_attn.sinks", HEADS),)),
    row(
        "helium",
        "Helium",
        heads_fill_hidden=True,
        head_counts=(("self_attn.num_key_value_groups", HEADS_PER_GROUP),),
    ),
    row("apertus", "Apertus", mlp_rows=_UP_ALONE),
    row("arcee", "Arcee", mlp_rows=_UP_ALONE),
    row("nemotron", "Nemotron", mlp_rows=_UP_ALONE),
    row(
        "stablelm",
        "StableLm",
        heads_fill_hidden=True,
        head_counts=(
            ("self_attn.num_heads", HEADS),
            ("self_attn.num_key_value_heads", KV_HEADS),
            ("self_attn.num_key_value_groups", HEADS_PER_GROUP),
        ),
        unsupported=(("qk_layernorm", "its norms are a module per head"),),
    ),
    row(
        "llama4_text",
        "Llama4",
        slim_type="slim_llama4",
        config_class="Llama4TextConfig",
        model_class="Llama4TextModel",
        mlp_out="feed_forward.down_proj",
        mlp_rows=_FEED_FORWARD,
        columns_key="intermediate_size_mlp",
        experts="feed_forward.experts",
        expert_layout=ExpertLayout(transposed=True, gate_on_inputs=True),
        expert_columns_key="intermediate_size",
        num_experts_key="num_local_experts",
        router="feed_forward.router",
        shared_expert="feed_forward.shared_expert",
    ),
    row("starcoder2", "Starcoder2", mlp_out="mlp.c_proj", mlp_rows=(("mlp.c_fc", (COLUMNS,)),)),
    row(
        "phi",
        "Phi",
        attention_out="self_attn.dense",
        mlp_out="mlp.fc2",
        mlp_rows=(("mlp.fc1", (COLUMNS,)),),
        heads_fill_hidden=True,
        head_counts=(("self_attn.num_key_value_groups", HEADS_PER_GROUP),),
    ),
    row(
        "persimmon",
        "Persimmon",
        attention_out="self_attn.dense",
        attention_rows=(("self_attn.query_key_value", (QKV,)),),
        mlp_out="mlp.dense_4h_to_h",
        mlp_rows=(("mlp.dense_h_to_4h", (COLUMNS,)),),
        heads_fill_hidden=True,
        head_counts=(("self_attn.num_heads", HEADS),),
    ),
    row(
        "gpt_neox",
        "GPTNeoX",
        layers="gpt_neox.layers",
        attention_out="attention.dense",
        attention_rows=(("attention.query_key_value", (QKV,)),),
        mlp_out="mlp.dense_4h_to_h",
        mlp_rows=(("mlp.dense_h_to_4h", (COLUMNS,)),),
        heads_fill_hidden=True,
    ),
    row("mixtral", "Mixtral", expert_columns_key="intermediate_size"),
    row("qwen3_moe", "Qwen3Moe", expert_columns_key="moe_intermediate_size"),
    row(
        "olmoe",
        "Olmoe",
        head_norms=_QK_NORMS_OVER_HEADS,
        heads_fill_hidden=True,
        head_counts=(("self_attn.num_key_value_groups", HEADS_PER_GROUP),),
        expert_columns_key="intermediate_size",
    ),
    row(
        "qwen2_moe",
        "Qwen2Moe",
        **_GATED_SHARED_EXPERT,
    ),
    row(
        "granitemoe",
        "GraniteMoe",
        **_GRANITE_EXPERTS,
    ),
    row(
        "phimoe",
        "Phimoe",
        expert_columns_key="intermediate_size",
        num_experts_key="num_local_experts",
        router="mlp.router",
        fewest_experts=2,
    ),
    row(
        "hunyuan_v1_moe",
        "HunYuanMoEV1",
        expert_columns_key="intermediate_size",
        router_tensors=(("wg.weight", 0),),
        shared_expert="mlp.shared_mlp",
    ),
    row(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        expert_columns_key="moe_intermediate_size",
        num_experts_key="moe_num_experts",
        router_tensors=(("weight", 0), ("moe_statics.e_score_correction_bias", 1)),
        shared_expert="mlp.shared_experts",
        shared_count_key="moe_num_shared_experts",
    ),
    row(
        "glm4_moe",
        "Glm4Moe",
        **_ROUTED_EXPERTS,
        **_CORRECTED_SCORES,
    ),
    row(
        "gpt_oss",
        "GptOss",
        head_parameters=(("self_attn.sinks", HEADS),),
        expert_layout=ExpertLayout(transposed=True, interleaved=True),
        expert_columns_key="intermediate_size",
        num_experts_key="num_local_experts",
        router="mlp.router",
        router_tensors=(("weight", 0), ("bias", 0)),
    ),
    row(
        "deepseek_v2",
        "DeepseekV2",
        attention_rows=_LATENT_ROWS,
        latent_attention=True,
        **_ROUTED_EXPERTS,
    ),
    row(
        "deepseek_v3",
        "DeepseekV3",
        attention_rows=_LATENT_ROWS,
        latent_attention=True,
        **_ROUTED_EXPERTS,
        **_CORRECTED_SCORES,
    ),
    row("minicpm3", "MiniCPM3", attention_rows=_LATENT_ROWS, latent_attention=True),
    row(
        "qwen3_5_text",
        "Qwen3_5",
        slim_type="slim_qwen3_5",
        config_class="Qwen3_5TextConfig",
        model_class="Qwen3_5TextModel",
        attention_rows=_GATED_QUERIES,
    ),
    row(
        "qwen3_next",
        "Qwen3Next",
        attention_rows=_GATED_QUERIES,
        **_GATED_SHARED_EXPERT,
    ),
    row("olmo_hybrid", "OlmoHybrid", head_norms=_QK_NORMS_OVER_HEADS),
    row(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        mlp_out="shared_mlp.output_linear",
        mlp_rows=(("shared_mlp.input_linear", (COLUMNS, COLUMNS)),),
        columns_key="shared_intermediate_size",
        **_GRANITE_EXPERTS,
        shared_expert="shared_mlp",
        shared_out="output_linear",
        shared_rows=(("input_linear", (SHARED_COLUMNS, SHARED_COLUMNS)),),
        shared_columns_key="shared_intermediate_size",
    ),
    row(
        "jamba",
        "Jamba",
        mlp_out="feed_forward.down_proj",
        mlp_rows=_FEED_FORWARD,
        experts="feed_forward.experts",
        expert_columns_key="intermediate_size",
        router="feed_forward.router",
        fewest_experts=2,
    ),
    row(
        "nemotron_h",
        "NemotronH",
        single_blocks=True,
        attention_out="mixer.o_proj",
        attention_rows=(
            ("mixer.q_proj", (HEADS,)),
            ("mixer.k_proj", (KV_HEADS,)),
            ("mixer.v_proj", (KV_HEADS,)),
        ),
        mlp_out="mixer.down_proj",
        mlp_rows=(("mixer.up_proj", (COLUMNS,)),),
        experts="mixer.experts",
        expert_layout=ExpertLayout(gated=False),
        expert_columns_key="moe_intermediate_size",
        num_experts_key="n_routed_experts",
        router="mixer.gate",
        **_CORRECTED_SCORES,
        shared_expert="mixer.shared_experts",
        shared_rows=(("up_proj", (SHARED_COLUMNS,)),),
        shared_columns_key="moe_shared_expert_intermediate_size",
        unsupported=(("moe_latent_size", "its experts work on latents"),),
    ),
    row("falcon_h1", "FalconH1", tuple_outputs=True, mlp_out="feed_forward.down_proj", mlp_rows=_FEED_FORWARD),
    row(
        "lfm2",
        "Lfm2",
        attention_out="self_attn.out_proj",
        mlp_out="feed_forward.w2",
        mlp_rows=(("feed_forward.w1", (COLUMNS,)), ("feed_forward.w3", (COLUMNS,))),
        fixed_keys=(("block_auto_adjust_ff_dim", False),),
    ),
)

# Model types that no row of this layout can prune, and why.
_GEMMA_LAYERS = "its layers share keys and values, and have inputs of their own, by token, beside the hidden states"
REFUSED_TYPES = {"gemma3n_text": _GEMMA_LAYERS, "gemma4_text": _GEMMA_LAYERS, "gemma4_unified_text": _GEMMA_LAYERS}

# The row of every model type, before and after pruning.
FAMILIES: dict[str, Family] = {name: family for family in ROWS for name in (family.base_type, family.slim_type)}
