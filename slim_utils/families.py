"""What pruning asks of a model: the row of its family, the sizes of its layers, its linear maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from models.families import FAMILIES, REFUSED_TYPES, ROWS
from models.family import (
    BLOCKED_QVK,
    COLUMNS,
    GATED_HEADS,
    GROUPED_QKV,
    HEADS,
    KV_HEADS,
    LATENT_KEY_VALUES,
    LATENT_QUERIES,
    QKV,
    SHARED_COLUMNS,
    Family,
)
from models.wrappers import WRAPPER_ROWS, is_multimodal
from slim_utils.common.checkpoint_checks import check_unquantised
from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# With the table, which is imported from here.
__all__ = [
    "BLOCKED_QVK",
    "COLUMNS",
    "FAMILIES",
    "GATED_HEADS",
    "GROUPED_QKV",
    "HEADS",
    "KV_HEADS",
    "LATENT_KEY_VALUES",
    "LATENT_QUERIES",
    "PLUGIN_FAMILIES",
    "QKV",
    "SERVED_FAMILIES",
    "SERVED_MIXTURES",
    "SERVED_STOCK",
    "SHARED_COLUMNS",
    "Family",
    "LayerShape",
    "as_linear",
    "find_family",
    "layer_shapes",
    "linear_map",
    "unknown_type_message",
]

UNKNOWN_TYPE_ADVICE = "; docs/families.md lists all, and --family_like of model_slimming.py tries the layout of another"
# Families tested with per-layer shapes in vLLM's Transformers backend.
SERVED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Mixtures tested as stock checkpoints with fewer experts in vLLM.
SERVED_MIXTURES = ("mixtral", "qwen3_moe")
# Those tested in stock shapes, without the plugin.
SERVED_STOCK = (
    *(*SERVED_FAMILIES, *SERVED_MIXTURES),
    *("gemma", "gemma2", "gemma3_text", "glm4", "granite", "olmo2", "olmo3", "phi3", "smollm3"),
)
# Those of the vLLM plugin.
PLUGIN_FAMILIES = (
    *SERVED_FAMILIES,
    *("gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "olmo3", "smollm3", "mixtral", "qwen3_moe"),
)


def linear_map(layer: nn.Module, name: str) -> nn.Linear:
    """Return the linear map ``name`` of a layer, with weights (out, in), see :func:`as_linear`.

    Raises:
        TypeError: if the module is neither an ``nn.Linear`` nor a ``Conv1D``.
    """
    return as_linear(layer.get_submodule(name), name)


def as_linear(module: nn.Module, name: str) -> nn.Linear:
    """Return ``module``, or for a ``Conv1D``, which stores (in, out), an ``nn.Linear`` that shares its memory.

    Raises:
        TypeError: if the module, called ``name``, is neither.
    """
    if isinstance(module, Conv1D):
        linear = nn.Linear(module.nx, module.nf, device="meta")
        linear.weight = nn.Parameter(module.weight.data.T, requires_grad=False)
        linear.bias = nn.Parameter(module.bias.data, requires_grad=False)
        return linear
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}")
    return module


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    Attributes:
        num_heads: query heads; 0 where another mixer takes the place of attention, and in a layer with an FFN alone.
        num_kv_heads: key/value heads.
        head_dim: size of a head, in latent attention that of its values.
        num_columns: intermediate columns of the FFN, or of all experts side by side; 0 in a layer without an FFN.
        num_experts: number of experts; 0 for a dense FFN.
        num_shared_columns: intermediate columns of the shared expert beside the experts; 0 without one.
        query_dim: size of the queries and keys of a head in latent attention; 0 where it is ``head_dim``.
        rotated_dim: how much of them has positions, the keys' shared by all heads; 0 without latent attention.
        latent_dim: cached latents of a token, with its shared keys; 0 without latent attention.
        head_blocks: blocks of heads, each of which has to lose as many as the others; 1 without.
        kv_sharing: "store" where later layers use the keys and values too, all of which then stay, "reuse" where they
            are those of an earlier layer, else "".
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_columns: int
    num_experts: int = 0
    num_shared_columns: int = 0
    query_dim: int = 0
    rotated_dim: int = 0
    latent_dim: int = 0
    head_blocks: int = 1
    kv_sharing: str = ""

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads if self.num_heads else 1

    @property
    def head_groups(self) -> int:
        """Groups of heads that lose the same number each, where single heads are removed: blocks, or kv groups."""
        return self.head_blocks if self.head_blocks > 1 else self.num_kv_heads

    @property
    def cached_values(self) -> int:
        """Values of a token in the KV cache."""
        if self.kv_sharing == "reuse":
            return 0
        return self.latent_dim or 2 * self.num_kv_heads * self.head_dim

    @property
    def attention_macs(self) -> int:
        """Multiply-accumulates of a query with a key, and of its score with a value, in one head."""
        return (self.query_dim or self.head_dim) + self.head_dim

    @property
    def num_ffns(self) -> int:
        """Number of FFNs of the layer, which lose the same number of columns: the experts, or 1."""
        return self.num_experts or 1

    @property
    def ffn_width(self) -> int:
        """Intermediate columns of the FFN, or of one expert."""
        return self.num_columns // self.num_ffns

    @property
    def shared_per_column(self) -> int:
        """Columns that the shared expert loses with a column of every expert; 0 where it is narrower than an expert."""
        return self.num_shared_columns // (self.ffn_width or 1)


def unknown_type_message(model_type: str) -> str:
    """Return that ``model_type`` is not supported, with the reason, if there is one, or the nearest types that are."""
    if model_type in REFUSED_TYPES:
        return f"model type '{model_type}' is not supported: {REFUSED_TYPES[model_type]}"
    nearest = get_close_matches(model_type, [row.base_type for row in ROWS], n=3, cutoff=0)
    return f"model type '{model_type}' is not supported; nearest supported types: {', '.join(nearest)}"


def find_family(config: PreTrainedConfig) -> Family:
    """Return the row of the table for ``config``.

    Raises:
        UserError: if the family is not supported, or the weights are quantised.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        if is_multimodal(config):
            supported = ", ".join(dict.fromkeys(wrapper.base_type for wrapper in WRAPPER_ROWS))
            raise UserError(
                f"model type '{config.model_type}' is multimodal and not supported; supported multimodal types: "
                f"{supported}; docs/families.md says why others are not"
            )
        advice = "" if config.model_type in REFUSED_TYPES else UNKNOWN_TYPE_ADVICE
        raise UserError(unknown_type_message(config.model_type) + advice)
    for key, reason in family.unsupported:
        if getattr(config, key, None):
            raise UserError(f"model type '{config.model_type}' with {key} is not supported: {reason}")
    check_unquantised(config, config.name_or_path)
    return family


def layer_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """Return the sizes of every decoder layer, uniform or per layer."""
    family = FAMILIES[config.model_type]
    shapes = []
    for index, layer in enumerate(config.per_layer_config):
        experts, kv_sharing = family.num_experts(config, index), family.kv_sharing(config, index)
        shape = LayerShape(
            num_heads=layer.num_attention_heads,
            num_kv_heads=family.num_kv_heads(layer),
            head_dim=getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
            num_columns=family.ffn_width(layer, experts, kv_sharing) * (experts or 1),
            num_experts=experts,
            num_shared_columns=family.num_shared_columns(layer, kv_sharing) if experts else 0,
            head_blocks=family.head_blocks,
            kv_sharing=kv_sharing,
        )
        if family.latent_attention:
            shape = replace(
                shape,
                num_kv_heads=shape.num_heads,
                head_dim=layer.v_head_dim,
                query_dim=layer.qk_nope_head_dim + layer.qk_rope_head_dim,
                rotated_dim=layer.qk_rope_head_dim,
                latent_dim=layer.kv_lora_rank + layer.qk_rope_head_dim,
            )
        if not family.has_attention(config, index):
            shape = replace(shape, num_heads=0, num_kv_heads=0)
        if not family.has_ffn(config, index):
            shape = replace(shape, num_columns=0)
        shapes.append(shape)
    return shapes
