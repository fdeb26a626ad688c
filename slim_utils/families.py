"""Table of model families: the module and configuration names that pruning needs. A new family is one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from slim_utils.common.checkpoint_checks import check_unquantised
from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Kinds of rows of a linear map.
HEADS, KV_HEADS, COLUMNS = "heads", "kv_heads", "columns"
# Families exported to GGUF for llama.cpp.
EXPORTED_FAMILIES = ("llama", "mistral")
# Families tested with vLLM with per-layer shapes.
SERVED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Family:
    """Names of the prunable modules and configuration keys of a family. Module names are relative to a decoder layer.

    Attributes:
        base_type: model type of transformers, before pruning.
        slim_type: model type of the pruned model.
        layers: name of the list of decoder layers in the causal language model.
        attention_out: linear map whose input columns are the query heads side by side.
        attention_rows: linear maps that feed ``attention_out``, and the kinds of their output rows as stacked.
        mlp_out: linear map whose input columns are the FFN's intermediate columns.
        mlp_rows: linear maps that feed ``mlp_out``, and the kinds of their output rows as stacked.
        head_norms: RMS norms over all heads at once, and the kind of their weights.
        columns_key: configuration key of the FFN width.
        experts: module with the 3-D parameters ``gate_up_proj`` and ``down_proj`` of a mixture of experts, if any.
        router: module that chooses the experts of a token; its weight has a row per expert.
        expert_columns_key: configuration key of the width of an expert; empty for families without experts.
        heads_fill_hidden: whether the stock class requires heads that fill the hidden size.
    """

    base_type: str
    slim_type: str
    layers: str = "model.layers"
    attention_out: str = "self_attn.o_proj"
    attention_rows: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("self_attn.q_proj", (HEADS,)),
        ("self_attn.k_proj", (KV_HEADS,)),
        ("self_attn.v_proj", (KV_HEADS,)),
    )
    mlp_out: str = "mlp.down_proj"
    mlp_rows: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("mlp.gate_proj", (COLUMNS,)),
        ("mlp.up_proj", (COLUMNS,)),
    )
    head_norms: tuple[tuple[str, str], ...] = ()
    columns_key: str = "intermediate_size"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    expert_columns_key: str = ""
    heads_fill_hidden: bool = False

    @property
    def slim_config(self) -> type[PreTrainedConfig]:
        """Configuration class of the pruned model."""
        return self._slim_classes()[0]

    @property
    def slim_model(self) -> type[PreTrainedModel]:
        """Causal language model class of the pruned model, shipped inside the checkpoint."""
        return self._slim_classes()[1]

    def _slim_classes(self) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        # The import takes seconds.
        from models import SLIM_CLASSES

        return SLIM_CLASSES[self.base_type]

    def decoder_layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the decoder layers of ``model``."""
        return model.get_submodule(self.layers)

    def num_experts(self, config: PreTrainedConfig, index: int) -> int:
        """Return the number of experts of layer ``index``; 0 for a dense FFN."""
        if not self.expert_columns_key:
            return 0
        dense_layers = getattr(config, "mlp_only_layers", None) or ()
        sparse = index not in dense_layers and (index + 1) % getattr(config, "decoder_sparse_step", 1) == 0
        return config.num_experts if sparse else 0

    def width_key(self, num_experts: int) -> str:
        """Return the configuration key of the FFN width of a layer with ``num_experts`` experts."""
        return self.expert_columns_key if num_experts else self.columns_key


def linear_map(layer: nn.Module, name: str) -> nn.Linear:
    """Return the linear map ``name`` of a layer.

    Raises:
        TypeError: if the module is not an ``nn.Linear``.
    """
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}")
    return module


# Differences of every family from LLaMA, by model type; the classes are in ``models.SLIM_CLASSES``.
_DIFFERENCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "smollm3": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {"slim_type": "slim_gemma3"},
    "olmo2": {"head_norms": (("self_attn.q_norm", HEADS), ("self_attn.k_norm", KV_HEADS))},
    "granite": {},
    "phi3": {
        "attention_rows": (("self_attn.qkv_proj", (HEADS, KV_HEADS, KV_HEADS)),),
        "mlp_rows": (("mlp.gate_up_proj", (COLUMNS, COLUMNS)),),
    },
    "opt": {
        "layers": "model.decoder.layers",
        "attention_out": "self_attn.out_proj",
        "mlp_out": "fc2",
        "mlp_rows": (("fc1", (COLUMNS,)),),
        "columns_key": "ffn_dim",
        "heads_fill_hidden": True,
    },
    "mixtral": {"expert_columns_key": "intermediate_size"},
    "qwen3_moe": {"expert_columns_key": "moe_intermediate_size"},
}


def _table() -> dict[str, Family]:
    """Return the row of every model type, before and after pruning."""
    table: dict[str, Family] = {}
    for model_type, differences in _DIFFERENCES.items():
        row = Family(**{"base_type": model_type, "slim_type": f"slim_{model_type}", **differences})
        table |= {model_type: row, row.slim_type: row}
    return table


FAMILIES = _table()


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


def find_family(config: PreTrainedConfig) -> Family:
    """Return the row of the table for ``config``.

    Raises:
        UserError: if the family is not supported, or the weights are quantised.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"model type '{config.model_type}' is not supported; supported: {', '.join(_DIFFERENCES)}")
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
            num_columns=getattr(layer, family.width_key(experts)) * (experts or 1),
            num_experts=experts,
        )
        shapes.append(shape)
    return shapes
