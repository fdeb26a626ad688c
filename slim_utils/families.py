"""What pruning asks of a model: the row of its family, the sizes of its layers, its linear maps."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from torch import nn

from models.families import COLUMNS, FAMILIES, HEADS, KV_HEADS, QKV, ROWS, Family
from slim_utils.common.checkpoint_checks import check_unquantised
from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# With the table, which is imported from here.
__all__ = [
    "COLUMNS",
    "EXPORTED_FAMILIES",
    "FAMILIES",
    "HEADS",
    "KV_HEADS",
    "QKV",
    "SERVED_FAMILIES",
    "Family",
    "LayerShape",
    "find_family",
    "layer_shapes",
    "linear_map",
    "unknown_type_message",
]

UNKNOWN_TYPE_ADVICE = "; docs/families.md lists all, and --family_like of model_slimming.py tries the layout of another"
# Families exported to GGUF for llama.cpp.
EXPORTED_FAMILIES = ("llama", "mistral")
# Families tested with per-layer shapes in vLLM's Transformers backend.
SERVED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Those of the vLLM plugin.
PLUGIN_FAMILIES = (
    *SERVED_FAMILIES,
    *("gemma2", "gemma3_text", "phi3", "granite", "smollm3", "mixtral", "qwen3_moe"),
)


def linear_map(layer: nn.Module, name: str) -> nn.Linear:
    """Return the linear map ``name`` of a layer.

    Raises:
        TypeError: if the module is not an ``nn.Linear``.
    """
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}")
    return module


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: size of a head.
        num_columns: intermediate columns of the FFN, or of all experts side by side.
        num_experts: number of experts; 0 for a dense FFN.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_columns: int
    num_experts: int = 0

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_ffns(self) -> int:
        """Number of FFNs of the layer, which lose the same number of columns: the experts, or 1."""
        return self.num_experts or 1

    @property
    def ffn_width(self) -> int:
        """Intermediate columns of the FFN, or of one expert."""
        return self.num_columns // self.num_ffns


def unknown_type_message(model_type: str) -> str:
    """Return that ``model_type`` is not supported, with the nearest types that are."""
    nearest = get_close_matches(model_type, [row.base_type for row in ROWS], n=3, cutoff=0)
    return f"model type '{model_type}' is not supported; nearest supported types: {', '.join(nearest)}"


def find_family(config: PreTrainedConfig) -> Family:
    """Return the row of the table for ``config``.

    Raises:
        UserError: if the family is not supported, or the weights are quantised.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(unknown_type_message(config.model_type) + UNKNOWN_TYPE_ADVICE)
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
        experts = family.num_experts(config, index)
        shape = LayerShape(
            num_heads=layer.num_attention_heads,
            num_kv_heads=getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
            head_dim=getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
            num_columns=(getattr(layer, family.width_key(experts)) or 4 * layer.hidden_size) * (experts or 1),
            num_experts=experts,
        )
        shapes.append(shape)
    return shapes
