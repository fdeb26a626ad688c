"""Sizes, scales, sliding windows and rotary embeddings in the keys of a GGUF file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGUFWriter, RopeScalingType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slim_utils.gguf_families import Architecture, rope_parameters, sliding_window, window_period

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from slim_utils.families import LayerShape

logger = logging.getLogger(__name__)

SCALING_TYPES = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN, "longrope": RopeScalingType.LONGROPE}


def write_metadata(
    writer: GGUFWriter, architecture: Architecture, config: PreTrainedConfig, shapes: list[LayerShape]
) -> None:
    """Write all keys about the layers; heads and widths are lists for per-layer shapes."""
    per_layer = len(set(shapes)) > 1
    heads, kv_heads, columns = (
        [getattr(shape, name) for shape in shapes] for name in ("num_heads", "num_kv_heads", "ffn_width")
    )
    writer.add_block_count(len(shapes))
    writer.add_context_length(context_length(architecture, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(kv_heads if per_layer else kv_heads[0])
    writer.add_feed_forward_length(columns if per_layer else columns[0])
    if shapes[0].num_experts:
        writer.add_expert_count(shapes[0].num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(shapes[0].ffn_width)
    writer.add_key_length(shapes[0].head_dim)
    writer.add_value_length(shapes[0].head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, method in architecture.scales:
        if getattr(config, key) is not None:
            getattr(writer, method)(getattr(config, key))
    _write_windows(writer, architecture, config)
    _write_rope(writer, architecture, config, shapes[0].head_dim)


def context_length(architecture: Architecture, config: PreTrainedConfig) -> int:
    """Context length: the positions or, where llama.cpp ignores windows, the window, within which attention is full."""
    window = sliding_window(config)
    if window is None or architecture.windows:
        return config.max_position_embeddings
    logger.warning(
        "llama.cpp's %s has no sliding window: the context length is set to the window, %d tokens instead of %d; "
        "results on longer contexts would differ from those of Transformers",
        architecture.name.lower(),
        window,
        config.max_position_embeddings,
    )
    return window


def _write_windows(writer: GGUFWriter, architecture: Architecture, config: PreTrainedConfig) -> None:
    window, period = sliding_window(config), window_period(config)
    if architecture.windows and period is not None:
        window = config.sliding_window if period != 1 else None
        if architecture.windows_needed and window is None:
            # A window of the whole context is none.
            window, period = config.max_position_embeddings, 2
        writer.add_sliding_window_pattern(period)
    if window is not None:
        writer.add_sliding_window(window)


def _write_rope(writer: GGUFWriter, architecture: Architecture, config: PreTrainedConfig, head_dim: int) -> None:
    rope, local = rope_parameters(config)
    rope_type = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture.local_rope:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if rope_type in SCALING_TYPES:
        writer.add_rope_scaling_type(SCALING_TYPES[rope_type])
    if rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if rope_type in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope_type == "longrope":
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS[rope_type](config)[1])


def rope_tensors(config: PreTrainedConfig, head_dim: int) -> dict[str, numpy.ndarray]:
    """Divisors (rotary dimensions / 2,) of the rotary frequencies, fp32, by the name of their tensor.

    Args:
        config: configuration of the model.
        head_dim: size of a head.
    """
    rope, _ = rope_parameters(config)
    if rope.get("rope_type") == "longrope":
        lists = {MODEL_TENSOR.ROPE_FACTORS_LONG: "long_factor", MODEL_TENSOR.ROPE_FACTORS_SHORT: "short_factor"}
        return {f"{TENSOR_NAMES[kind]}.weight": numpy.array(rope[key], numpy.float32) for kind, key in lists.items()}
    if rope.get("rope_type") == "llama3":
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config)[0].numpy()
        plain = rope["rope_theta"] ** (-numpy.arange(0, head_dim, 2) / head_dim)
        return {f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight": (plain / scaled).astype(numpy.float32)}
    return {}
