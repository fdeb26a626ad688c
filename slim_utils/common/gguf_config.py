"""The configuration of a GGUF file: what transformers does not read, or takes from the defaults of the family."""

from __future__ import annotations

from math import isclose
from typing import TYPE_CHECKING

from transformers import MixtralConfig

from slim_utils.common.gguf_header import PADDING_KEY, GgufHeader, read_header, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Numbers of layers with which llama.cpp scales the attention of a Gemma by the hidden size per head, not by the head.
DEEP_GEMMAS = {"gemma2": 46, "gemma3": 62}
# Every n-th layer of a Gemma has full attention, if the file does not say which.
_GEMMA_PERIODS = {"gemma2": 2, "gemma3": 6}
# The window of a Gemma whose file names none.
_GEMMA_WINDOWS = {"gemma2": 4096, "gemma3": 0}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# llama.cpp's base of rotary embeddings, if the file names none.
_ROPE_THETA = 10_000.0
# Sizes of the published Phi-3 whose window is shorter than the context, and whose first files do not name it.
_WINDOWED_PHI3_LAYERS, _WINDOWED_PHI3_CONTEXT = (32, 40), 4096
_SLIDING, _FULL = "sliding_attention", "full_attention"


def complete_config(config: PreTrainedConfig, model_path: str) -> PreTrainedConfig:
    """The configuration that a GGUF file describes.

    Args:
        config: what transformers reads.
        model_path: the file.

    Raises:
        UserError: if the file describes a model that transformers does not have, or does not say which.
    """
    header = read_header(model_path)
    if header.has_experts:
        config = _with_experts(config, header)
    # Otherwise the default of the family, which may not be a token of the model.
    config.pad_token_id = header.fields.get(PADDING_KEY)
    if header.value("attention.key_length") and hasattr(config, "head_dim"):
        config.head_dim = header.value("attention.key_length")
    if header.architecture in DEEP_GEMMAS:
        _complete_gemma(config, header, model_path)
    if header.architecture == "phi3":
        _complete_phi3(config, header, model_path)
    _complete_rope(config, header, model_path)
    return config


def _with_experts(config: PreTrainedConfig, header: GgufHeader) -> PreTrainedConfig:
    """The sizes of experts, which transformers does not read; a LLaMA with experts is a Mixtral."""
    if header.architecture == "llama":
        known = MixtralConfig().to_dict().keys() - {"model_type", "architectures"}
        config = MixtralConfig(
            **{key: value for key, value in config.to_dict().items() if key in known},
            num_local_experts=header.value("expert_count"),
            num_experts_per_tok=header.value("expert_used_count"),
        )
        config.intermediate_size = header.value("expert_feed_forward_length", config.intermediate_size)
    elif header.architecture == "qwen3moe":
        config.moe_intermediate_size = header.value("expert_feed_forward_length", config.moe_intermediate_size)
        config.norm_topk_prob = True
    return config


def _complete_gemma(config: PreTrainedConfig, header: GgufHeader, model_path: str) -> None:
    """Set the scale of the attention, which llama.cpp derives, soft caps and windows."""
    deep = config.num_hidden_layers == DEEP_GEMMAS[header.architecture]
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if deep else config.head_dim
    for key in _SOFTCAPS:
        if header.value(key) is not None:
            setattr(config, key, header.value(key))
    window = header.value("attention.sliding_window", _GEMMA_WINDOWS[header.architecture])
    sliding = _sliding_layers(config.num_hidden_layers, header, model_path) if window else []
    config.layer_types = [_SLIDING if kind else _FULL for kind in sliding or [False] * config.num_hidden_layers]
    if window:
        config.sliding_window = window


def _sliding_layers(num_layers: int, header: GgufHeader, model_path: str) -> list[bool]:
    """Which layers have a window: all but every n-th, all for n = 0, or those that the file lists."""
    pattern = header.value("attention.sliding_window_pattern", _GEMMA_PERIODS[header.architecture])
    if not isinstance(pattern, list):
        return [pattern == 0 or index % pattern < pattern - 1 for index in range(num_layers)]
    if len(pattern) != num_layers:
        raise refusal(model_path, f"sliding_window_pattern of {len(pattern)} layers, but it has {num_layers}")
    return [bool(kind) for kind in pattern]


def _complete_phi3(config: PreTrainedConfig, header: GgufHeader, model_path: str) -> None:
    """Set the window, which all layers have; 0 stands for none."""
    window = header.value("attention.sliding_window")
    context, layers = config.max_position_embeddings, config.num_hidden_layers
    if window is None and context == _WINDOWED_PHI3_CONTEXT and layers in _WINDOWED_PHI3_LAYERS:
        raise refusal(model_path, "does not say the sliding window of its Phi-3")
    config.sliding_window = window or None


def _complete_rope(config: PreTrainedConfig, header: GgufHeader, model_path: str) -> None:
    """Set rotary dimensions and the base of sliding windows; check the base."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    full, local = rope.get(_FULL, rope), rope.get(_SLIDING)
    if local is not None:
        local["rope_theta"] = header.value("rope.freq_base_swa", _ROPE_THETA)
    theta = header.value("rope.freq_base", _ROPE_THETA)
    if not isclose(full["rope_theta"], theta, rel_tol=1e-5):
        reason = f"its rotary embeddings have the base {theta:g}, but transformers reads {full['rope_theta']:g}"
        raise refusal(model_path, reason)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = header.value("rope.dimension_count", head_dim)
    if "partial_rotary_factor" in full:
        full["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise refusal(model_path, f"{rotated} rotary dimensions of {head_dim} per head, but transformers reads all")
