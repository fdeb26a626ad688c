"""The table of model families: what the walk and the removal have to know of each. A new family is one row here."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from models import SlimLlamaConfig, SlimLlamaForCausalLM
from slim_utils.errors import UserError


@dataclass(frozen=True)
class Family:
    """Where a family keeps what is pruned. Module names are relative to a decoder layer.

    Attributes:
        slim_config: configuration class of the small model.
        slim_model: its causal language model, shipped inside the checkpoint.
        layers: name of the list of decoder layers in the causal language model.
        attention_out: linear map whose input columns are the query heads side by side.
        query_rows: linear maps whose output rows are the query heads.
        kv_rows: linear maps whose output rows are the key/value heads.
        mlp_out: linear map whose input columns are the FFN's intermediate columns.
        mlp_rows: linear maps whose output rows are those columns.
    """

    slim_config: type[PreTrainedConfig]
    slim_model: type[PreTrainedModel]
    layers: str = "model.layers"
    attention_out: str = "self_attn.o_proj"
    query_rows: tuple[str, ...] = ("self_attn.q_proj",)
    kv_rows: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")
    mlp_out: str = "mlp.down_proj"
    mlp_rows: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")

    def decoder_layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of ``model``."""
        return model.get_submodule(self.layers)


_LLAMA = Family(slim_config=SlimLlamaConfig, slim_model=SlimLlamaForCausalLM)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    SlimLlamaConfig.model_type: _LLAMA,
}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_columns: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


def find_family(config: PreTrainedConfig) -> Family:
    """The row of the table for ``config``.

    Raises:
        UserError: for a family that is not in the table, or weights that are quantised.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"model type '{config.model_type}' is not supported; supported: {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None):
        raise UserError("the model's weights are quantised; give the unquantised checkpoint")
    return family


def layer_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """Sizes of every decoder layer, whether all alike or per layer."""
    return [
        LayerShape(
            num_heads=layer.num_attention_heads,
            num_kv_heads=layer.num_key_value_heads,
            head_dim=layer.head_dim,
            num_columns=layer.intermediate_size,
        )
        for layer in config.per_layer_config
    ]
