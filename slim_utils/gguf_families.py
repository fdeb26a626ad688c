"""Table of the GGUF architectures that llama.cpp runs the families with, and what each of them can express."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slim_utils.common.errors import UserError
from slim_utils.common.gguf_config import DEEP_GEMMAS
from slim_utils.families import FAMILIES, LayerShape, layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")
LINEAR_ROPE = ("default", "linear")
PLAIN_ROPE = (*LINEAR_ROPE, "yarn")
# llama.cpp's SmolLM3 has rotary embeddings in all layers but every fourth.
NO_ROPE_INTERVAL = 4
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture expresses.

    Attributes:
        name: its name in ``gguf.MODEL_ARCH``.
        interleaved: whether the rows of a rotary pair are adjacent where those of Transformers are half a head apart.
        per_layer: whether heads and FFN widths may differ by layer.
        fills_hidden: whether the heads must fill the hidden size.
        fused: whether query, key and value, and gate and up, are single maps where Transformers has single maps.
        activations: activations of the FFN.
        rope_types: scalings of the rotary embeddings.
        partial_rotary: whether rotary embeddings may cover a part of a head.
        windows: whether sliding windows are attended to as such, in all layers but every n-th.
        windows_needed: whether at least one layer has to have a window.
        local_rope: whether sliding windows may have another base of the rotary embeddings.
        biases: configuration keys of biases that may be set.
        norm_offset: what Transformers adds to the weights of the norms.
        scales: configuration keys with the methods of ``gguf.GGUFWriter`` that write them.
        required: configuration keys that must be set, since llama.cpp has a default of its own.
        unset: configuration keys that may not be set.
        query_map: module of a layer whose weights take up a scale of the attention other than llama.cpp's.
        deep: number of layers with which llama.cpp scales the attention by the hidden size per head.
        output: whether the head is written even if it equals the embedding.
        experts: whether the FFNs of all layers may be experts.
        dense: whether they may be dense.
        no_rope_layers: whether every ``NO_ROPE_INTERVAL``-th layer is without rotary embeddings.
    """

    name: str
    interleaved: bool = False
    per_layer: bool = False
    fills_hidden: bool = False
    fused: bool = False
    activations: tuple[str, ...] = SILU
    rope_types: tuple[str, ...] = PLAIN_ROPE
    partial_rotary: bool = False
    windows: bool = False
    windows_needed: bool = False
    local_rope: bool = False
    biases: tuple[str, ...] = ()
    norm_offset: float = 0.0
    scales: tuple[tuple[str, str], ...] = ()
    required: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    query_map: str = ""
    deep: int = 0
    output: bool = False
    experts: bool = False
    dense: bool = True
    no_rope_layers: bool = False


_BIASES = ("attention_bias", "mlp_bias")
_ALL_BIASES = (*_BIASES, "attention_out_bias", "use_bias")
_FINAL_CAP = ("final_logit_softcapping", "add_final_logit_softcapping")
_ATTENTION_CAP = ("attn_logit_softcapping", "add_attn_logit_softcapping")
_BIDIRECTIONAL = "use_bidirectional_attention"

LLAMA = Architecture(
    "LLAMA", interleaved=True, rope_types=(*PLAIN_ROPE, "llama3", "longrope"), biases=_BIASES, experts=True
)
DECI = Architecture("DECI", interleaved=True, per_layer=True, rope_types=(*PLAIN_ROPE, "llama3"), biases=_BIASES)
QWEN2 = Architecture("QWEN2", fills_hidden=True)
QWEN3 = Architecture("QWEN3")
QWEN3MOE = Architecture("QWEN3MOE", experts=True, dense=False, required=("norm_topk_prob",))
GEMMA = Architecture("GEMMA", activations=GELU, rope_types=LINEAR_ROPE, norm_offset=1.0, unset=(_BIDIRECTIONAL,))
GEMMA2 = Architecture(
    "GEMMA2",
    activations=GELU,
    rope_types=LINEAR_ROPE,
    norm_offset=1.0,
    windows=True,
    windows_needed=True,
    scales=(_ATTENTION_CAP, _FINAL_CAP),
    required=(_ATTENTION_CAP[0], _FINAL_CAP[0]),
    unset=(_BIDIRECTIONAL,),
    query_map="self_attn.q_proj",
    deep=DEEP_GEMMAS["gemma2"],
)
GEMMA3 = Architecture(
    "GEMMA3",
    activations=GELU,
    rope_types=LINEAR_ROPE,
    norm_offset=1.0,
    windows=True,
    windows_needed=True,
    local_rope=True,
    scales=(_FINAL_CAP,),
    unset=(_ATTENTION_CAP[0], _BIDIRECTIONAL),
    query_map="self_attn.q_norm",
    deep=DEEP_GEMMAS["gemma3"],
)
PHI3 = Architecture("PHI3", fills_hidden=True, fused=True, rope_types=(*PLAIN_ROPE, "longrope"), partial_rotary=True)
GRANITE = Architecture(
    "GRANITE",
    interleaved=True,
    rope_types=(*PLAIN_ROPE, "llama3"),
    biases=_BIASES,
    scales=(
        ("attention_multiplier", "add_attention_scale"),
        ("embedding_multiplier", "add_embedding_scale"),
        ("residual_multiplier", "add_residual_scale"),
        ("logits_scaling", "add_logit_scale"),
    ),
)
OLMO2 = Architecture("OLMO2", fills_hidden=True, windows=True, output=True)
SMOLLM3 = Architecture("SMOLLM3", interleaved=True, no_rope_layers=True)
SEED_OSS = Architecture("SEED_OSS", biases=("attention_bias",))
# Rotary pairs are adjacent in Transformers too.
ERNIE4_5 = Architecture("ERNIE4_5")
ARCEE = Architecture("ARCEE", interleaved=True, activations=("relu2",))

# Architectures of every exported family, the first that expresses a model is used. Qwen2 and Phi-3 have the layers of a
# LLaMA, with biases or fused maps.
GGUF_FAMILIES = {
    "llama": (LLAMA, DECI),
    "mistral": (LLAMA, DECI),
    "qwen2": (QWEN2, LLAMA, DECI),
    "qwen3": (QWEN3,),
    "gemma": (GEMMA,),
    "gemma2": (GEMMA2,),
    "gemma3_text": (GEMMA3,),
    "phi3": (PHI3, LLAMA, DECI),
    "granite": (GRANITE,),
    "olmo2": (OLMO2,),
    "olmo3": (OLMO2,),
    "smollm3": (SMOLLM3,),
    "seed_oss": (SEED_OSS,),
    "ernie4_5": (ERNIE4_5,),
    "arcee": (ARCEE,),
    "mixtral": (LLAMA,),
    "qwen3_moe": (QWEN3MOE,),
}


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """The architecture for a model with this configuration.

    Raises:
        UserError: naming the setting that no architecture of the family expresses.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or family.base_type not in GGUF_FAMILIES:
        supported = ", ".join(GGUF_FAMILIES)
        raise UserError(f"export of model type '{config.model_type}' is not supported; supported: {supported}")
    reason = ""
    for architecture in GGUF_FAMILIES[family.base_type]:
        reason = obstacle(architecture, config)
        if not reason:
            return architecture
    raise UserError(f"export of {reason}")


def is_exportable(config: PreTrainedConfig) -> bool:
    """Whether llama.cpp runs a model with this configuration."""
    architectures = GGUF_FAMILIES.get(FAMILIES[config.model_type].base_type, ())
    return any(not obstacle(architecture, config) for architecture in architectures)


def obstacle(architecture: Architecture, config: PreTrainedConfig) -> str:
    """What ``architecture`` cannot express of a model with this configuration; empty if nothing."""
    shapes = layer_shapes(config)
    name, stock = f"llama.cpp's {architecture.name.lower()}", "export the masked model (the folder of --save_dir)"
    kinds = {shape.num_experts > 0 for shape in shapes}
    if (True in kinds and not architecture.experts) or (False in kinds and not architecture.dense) or len(kinds) > 1:
        return f"layers of experts and dense ones (mlp_only_layers, decoder_sparse_step) is not supported by {name}"
    if len(set(shapes)) > 1 and not architecture.per_layer:
        return f"per-layer shapes is not supported by {name}; prune with --uniform_shapes, or {stock}"
    if architecture.fills_hidden and shapes[0].num_heads * shapes[0].head_dim != config.hidden_size:
        return f"heads that do not fill the hidden size is not supported by {name}; {stock}"
    return _rope_obstacle(architecture, config, name) or _setting_obstacle(architecture, config, name)


def _rope_obstacle(architecture: Architecture, config: PreTrainedConfig, name: str) -> str:
    rope, local = rope_parameters(config)
    rope_type = rope.get("rope_type", "default")
    if rope_type not in architecture.rope_types:
        supported = ", ".join(architecture.rope_types)
        return f"rotary embeddings '{rope_type}' is not supported by {name}; supported: {supported}"
    # The library reads whether the range is truncated from the top level.
    truncated = bool(config.rope_parameters.get("truncate", True))
    if rope_type == "yarn" and (key := _other_yarn(rope, truncated)):
        return f"rotary embeddings 'yarn' with this {key} is not supported by {name}, which has the default"
    if local["rope_type"] != "default" or (local["rope_theta"] != rope["rope_theta"] and not architecture.local_rope):
        return f"these rotary embeddings of sliding windows, '{local['rope_type']}', is not supported by {name}"
    if rope.get("partial_rotary_factor") not in (None, 1.0) and not architecture.partial_rotary:
        return f"partial rotary embeddings (partial_rotary_factor) is not supported by {name}"
    published = [int((index + 1) % NO_ROPE_INTERVAL != 0) for index in range(config.num_hidden_layers)]
    if architecture.no_rope_layers and config.no_rope_layers != published:
        return f"no_rope_layers other than every {NO_ROPE_INTERVAL}th is not supported by {name}"
    return ""


def _other_yarn(rope: dict[str, Any], truncated: bool) -> str:
    """The first setting of yarn with another value than that which llama.cpp has, or derives from the factor."""
    values = {"attention_factor": 0.1 * math.log(rope["factor"]) + 1, "beta_fast": 32, "beta_slow": 1}
    stored = {key: value if rope.get(key) is None else rope[key] for key, value in values.items()}
    others = [key for key, value in values.items() if not math.isclose(stored[key], value)]
    if not truncated:
        others.append("truncate")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        others.append("mscale_all_dim")
    return others[0] if others else ""


def _setting_obstacle(architecture: Architecture, config: PreTrainedConfig, name: str) -> str:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in architecture.activations:
        return f"hidden_act '{activation}' is not supported by {name}, which only has {architecture.activations[0]}"
    for key in _ALL_BIASES:
        if getattr(config, key, None) and key not in architecture.biases:
            return f"{key} is not supported by {name}"
    for key in architecture.unset:
        if getattr(config, key, None):
            return f"{key} is not supported by {name}"
    for key in architecture.required:
        if not getattr(config, key):
            return f"a model without {key} is not supported by {name}"
    if architecture.windows and window_period(config) is None:
        return f"these layer_types is not supported by {name}; supported: full attention in every n-th layer"
    return ""


def rope_parameters(config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of the rotary embeddings of full attention, and of sliding windows."""
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    if SLIDING in rope and SLIDING in config.layer_types:
        return full, rope[SLIDING]
    return full, {"rope_type": "default", "rope_theta": full["rope_theta"]}


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Sliding window in tokens, if it is shorter than the positions and any layer has it."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window is None or window >= config.max_position_embeddings or (layer_types and SLIDING not in layer_types):
        return None
    return window


def window_period(config: PreTrainedConfig) -> int | None:
    """Period n with which every n-th layer has full attention; 0 if none has, ``None`` without a period."""
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    sliding = [kind == SLIDING for kind in layer_types]
    if all(sliding):
        return 0
    period = sliding.index(False) + 1
    return period if sliding == [index % period < period - 1 for index in range(len(sliding))] else None


def query_factor(architecture: Architecture, config: PreTrainedConfig, shape: LayerShape) -> float:
    """Factor of the queries that turns llama.cpp's scale of the attention into that of the model."""
    if not architecture.query_map:
        return 1.0
    width = shape.head_dim
    if config.num_hidden_layers == architecture.deep:
        width = config.hidden_size // shape.num_heads
    return (width / config.query_pre_attn_scalar) ** 0.5
