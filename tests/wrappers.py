"""Tiny random multimodal models, by model type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.tiny_models import HYBRID, TINY, VOCAB, WINDOWS, scale_layers

IMAGE_TOKEN = 60
_GROUPED = {**TINY, "num_key_value_heads": 2}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False}
_PIXTRAL = {"model_type": "pixtral", **_VISION, "image_size": 16, "head_dim": 8}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": 24,
}
_QWEN_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 61, "vision_start_token_id": 62}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
_QWEN3_5_ROPE = {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 0, 0], "mrope_interleaved": True}
_EXPERTS = {"num_experts_per_tok": 2}
_LLAMA4 = {"intermediate_size_mlp": 40, "no_rope_layers": [1, 1, 0, 1]}
_LLAMA4_VISION = {
    **_VISION,
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
_SCALED = {"query_pre_attn_scalar": 4, "sliding_window": 8, "layer_types": WINDOWS}
_GEMMA4 = {
    "sliding_window": 8,
    "layer_types": WINDOWS,
    "global_head_dim": 8,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
}
_GEMMA4_VISION = {
    **{key: size for key, size in _VISION.items() if key != "image_size"},
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
_GEMMA4_AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 16,
}
_GEMMA4_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 61, "audio_token_id": 62}


def _text(model_type: str, **differences: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_GROUPED, **differences}


# Each by a name that starts with its model type.
TINY_WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _text("gemma3_text", num_key_value_heads=3, **_SCALED),
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 1,
        "image_token_index": IMAGE_TOKEN,
    },
    "gemma4": {
        "text_config": _text("gemma4_text", **_GEMMA4, use_bidirectional_attention="vision"),
        "vision_config": _GEMMA4_VISION,
        **_GEMMA4_TOKENS,
    },
    "gemma4 of inputs by layer": {
        "text_config": _text(
            "gemma4_text",
            **{**_GEMMA4, "attention_k_eq_v": False, "hidden_size_per_layer_input": 6},
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
        ),
        "vision_config": _GEMMA4_VISION,
        "audio_config": _GEMMA4_AUDIO,
        **_GEMMA4_TOKENS,
    },
    "gemma4 with experts": {
        "text_config": _text(
            "gemma4_text",
            **_GEMMA4,
            use_bidirectional_attention="vision",
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
        ),
        "vision_config": _GEMMA4_VISION,
        **_GEMMA4_TOKENS,
    },
    "mistral3": {
        "text_config": _text("mistral"),
        "vision_config": _PIXTRAL,
        "image_token_index": IMAGE_TOKEN,
        "tie_word_embeddings": False,
    },
    "mistral3 of ministral3": {
        "text_config": _text("ministral3"),
        "vision_config": _PIXTRAL,
        "image_token_index": IMAGE_TOKEN,
    },
    "qwen2_vl": {
        "text_config": _text("qwen2_vl_text", rope_parameters=_MROPE),
        "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2},
        **_QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": _text("qwen2_5_vl_text", rope_parameters=_MROPE),
        "vision_config": {**_QWEN_VISION, "window_size": 8, "fullatt_block_indexes": [1]},
        **_QWEN_TOKENS,
        "tie_word_embeddings": True,
    },
    "qwen3_vl": {
        "text_config": _text("qwen3_vl_text", rope_parameters={**_MROPE, "mrope_interleaved": True}),
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": _text(
            "qwen3_vl_moe_text",
            **_EXPERTS,
            num_experts=4,
            moe_intermediate_size=16,
            mlp_only_layers=[1],
            rope_parameters={**_MROPE, "mrope_interleaved": True},
        ),
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
        "tie_word_embeddings": False,
    },
    "qwen3_5": {
        "text_config": _text("qwen3_5_text", **HYBRID, rope_parameters=_QWEN3_5_ROPE),
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
        **_QWEN_TOKENS,
    },
    "llama4": {
        "text_config": _text(
            "llama4_text", **_EXPERTS, **_LLAMA4, num_local_experts=4, moe_layers=[1, 3], intermediate_size=16
        ),
        "vision_config": _LLAMA4_VISION,
        "image_token_index": IMAGE_TOKEN,
    },
    "llama4 without experts": {
        "text_config": _text("llama4_text", **_LLAMA4, moe_layers=[]),
        "vision_config": _LLAMA4_VISION,
        "image_token_index": IMAGE_TOKEN,
    },
    "paligemma": {
        "text_config": _text("gemma"),
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE_TOKEN,
        "projection_dim": 24,
        "hidden_size": 24,
    },
    "paligemma of gemma2": {
        "text_config": _text("gemma2", **_SCALED),
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE_TOKEN,
        "projection_dim": 24,
        "hidden_size": 24,
    },
}


def make_wrapper(name: str) -> PreTrainedModel:
    """A random multimodal model with a language model of 4 layers, and weights for every unit to matter."""
    config = AutoConfig.for_model(name.partition(" ")[0], **TINY_WRAPPERS[name])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, experts_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scale_layers(model)
    return model.eval()


@torch.no_grad()
def text_logits(model: PreTrainedModel, samples: Tensor) -> Tensor:
    """Logits of a multimodal model for text alone; PaliGemma's, as for text after the prefix."""
    causal = {"token_type_ids": torch.ones_like(samples)} if "paligemma" in model.config.model_type else {}
    return model(samples, **causal).logits


def image_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of a text with an image."""
    model_type = next(name for name in ("paligemma", "qwen", "mistral3", "") if name in model.config.model_type)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, IMAGE_TOKEN, (1, 12), generator=generator)
    images = slice(2, 2 + {"paligemma": 4, "mistral3": 2}.get(model_type, 1))
    tokens[:, images] = IMAGE_TOKEN
    types = torch.zeros_like(tokens)
    types[:, images] = 1
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    if model_type == "qwen":
        inputs["pixel_values"] = torch.randn(4, 48, generator=generator)
        inputs |= {"image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": types}
    elif model_type == "mistral3":
        inputs["pixel_values"] = torch.randn(1, 3, 8, 16, generator=generator)
        inputs["image_sizes"] = torch.tensor([[8, 16]])
    elif "gemma3" in model.config.model_type:
        inputs["token_type_ids"] = types
    elif "gemma4" in model.config.model_type:
        inputs["image_position_ids"] = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
        inputs["pixel_values"] = torch.randn(1, 4, 48, generator=generator)
        inputs["mm_token_type_ids"] = types
    return inputs
