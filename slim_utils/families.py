"""The table of model families: what pruning needs to know of each. A new family is one row here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from slim_utils.common.checkpoint_checks import check_unquantised
from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What the rows of a linear map are made of, in the order they are stacked.
HEADS, KV_HEADS, COLUMNS = "heads", "kv_heads", "columns"
# Written as GGUF files for llama.cpp.
EXPORTED_FAMILIES = ("llama", "mistral")
# Served by vLLM with layers of unlike shapes, and tested with it.
SERVED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Family:
    """Where a family keeps what is pruned. Module names are relative to a decoder layer.

    Attributes:
        base_type: the library's model type before pruning.
        slim_type: that of the small model.
        layers: name of the list of decoder layers in the causal language model.
        attention_out: linear map whose input columns are the query heads side by side.
        attention_rows: linear maps that feed it, and what their output rows are.
        mlp_out: linear map whose input columns are the FFN's intermediate columns.
        mlp_rows: linear maps that feed it, and what their output rows are.
        head_norms: RMS norms that run over all heads at once, and what their weights stand for.
        columns_key: name of the FFN's width in the configuration.
        experts: module whose 3-D parameters ``gate_up_proj`` and ``down_proj`` are a mixture of experts, if any.
        expert_columns_key: name of an expert's width in the configuration; empty in families without experts.
        heads_fill_hidden: whether the library's own class knows no other heads than those that fill the hidden size.
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
    expert_columns_key: str = ""
    heads_fill_hidden: bool = False

    @property
    def slim_config(self) -> type[PreTrainedConfig]:
        """Configuration class of the small model."""
        return self._slim_classes()[0]

    @property
    def slim_model(self) -> type[PreTrainedModel]:
        """Its causal language model, shipped inside the checkpoint."""
        return self._slim_classes()[1]

    def _slim_classes(self) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        # Takes seconds to import.
        from models import SLIM_CLASSES

        return SLIM_CLASSES[self.base_type]

    def decoder_layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of ``model``."""
        return model.get_submodule(self.layers)

    def num_experts(self, config: PreTrainedConfig, index: int) -> int:
        """Experts of layer ``index``; 0 where its FFN is an ordinary one."""
        if not self.expert_columns_key:
            return 0
        ordinary = getattr(config, "mlp_only_layers", None) or ()
        sparse = index not in ordinary and (index + 1) % getattr(config, "decoder_sparse_step", 1) == 0
        return config.num_experts if sparse else 0

    def width_key(self, num_experts: int) -> str:
        """Name of the FFN's width in the configuration of a layer of so many experts."""
        return self.expert_columns_key if num_experts else self.columns_key


def linear_map(layer: nn.Module, name: str) -> nn.Linear:
    """The linear map ``name`` of a layer.

    Raises:
        TypeError: if it is a module of another class.
    """
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}")
    return module


# Every family, by model type: what differs from LLaMA. Their classes are in ``models.SLIM_CLASSES``.
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
    """A row for every model type, before pruning and after it."""
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
        head_dim: of each of them.
        num_columns: intermediate columns of the FFN, those of all its experts side by side.
        num_experts: 0 for an ordinary FFN.
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
        """FFNs that lose equally many columns: the experts, or one."""
        return self.num_experts or 1

    @property
    def ffn_width(self) -> int:
        """Columns of one of them."""
        return self.num_columns // self.num_ffns


def find_family(config: PreTrainedConfig) -> Family:
    """The row of the table for ``config``.

    Raises:
        UserError: for a family that is not in the table, or weights that are quantised.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"model type '{config.model_type}' is not supported; supported: {', '.join(_DIFFERENCES)}")
    check_unquantised(config, config.name_or_path)
    return family


def layer_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """Sizes of every decoder layer, whether all alike or per layer."""
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
