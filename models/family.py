"""What a row of the table of model families says: classes, modules and configuration keys that pruning needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Kinds of rows of a linear map; QKV: query, key and value of every head side by side; GROUPED_QKV: the queries of every
# kv group, its key and its value; BLOCKED_QVK: the queries of every block of heads, their values and their keys.
HEADS, KV_HEADS, COLUMNS, QKV, GROUPED_QKV, BLOCKED_QVK = (
    *("heads", "kv_heads", "columns"),
    *("qkv", "grouped_qkv", "blocked_qvk"),
)
# Query and gate of every head side by side.
GATED_HEADS = "gated_heads"
# Columns of the FFN of every token beside the experts.
SHARED_COLUMNS = "shared_columns"
# Heads of latent attention, in the map of queries, and in that of keys and values from the latents.
LATENT_QUERIES, LATENT_KEY_VALUES = "latent_queries", "latent_key_values"
# Query heads per kv head; entries of all query heads side by side.
HEADS_PER_GROUP, HEAD_ENTRIES = "heads_per_group", "head_entries"
# Layer types, as in ``layer_types``: with another mixer of tokens in place of attention heads, and with an FFN alone.
OTHER_MIXERS, FFNS_ALONE = ("linear_attention", "conv"), ("mlp", "moe")


@dataclass(frozen=True)
class ExpertLayout:
    """Layout of the 3-D parameters ``gate_up_proj`` and ``down_proj`` of experts.

    Attributes:
        gated: whether an FFN has a gate; without one, ``up_proj`` takes the place of ``gate_up_proj``.
        transposed: (experts, in, out) instead of (experts, out, in).
        interleaved: gate and up of a column are side by side, instead of all gates before all ups; the module applies
            its own gate to them.
        gate_on_inputs: the router's weights multiply the inputs of an expert, not its outputs.
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    gate_on_inputs: bool = False

    @property
    def columns_in(self) -> str:
        """Name of the parameter that feeds the columns."""
        return "gate_up_proj" if self.gated else "up_proj"


PLAIN_LAYOUT = ExpertLayout()


@dataclass(frozen=True)
class Family:
    """Classes, prunable modules and configuration keys of a family. Module names are relative to a decoder layer.

    Attributes:
        base_type: model type of transformers, before pruning.
        slim_type: model type of the pruned model.
        name: name of the family in its class names.
        config_class: configuration class of transformers.
        model_class: its model without a head.
        causal_class: its causal language model.
        layers: name of the list of decoder layers in the causal language model.
        single_blocks: whether a decoder layer is a mixer of tokens or an FFN, by ``layer_types``, and not both.
        token_inputs: whether the first argument of a layer after the hidden states is an input of its own, by token.
        shared_states: argument through which layers share keys and values with later ones, if any.
        tuple_outputs: whether a decoder layer returns its output as a tuple.
        transposed: whether its linear maps store their weights as (in, out), as ``Conv1D``.
        attention_out: linear map whose input columns are the query heads side by side.
        attention_rows: linear maps that feed ``attention_out``, and the kinds of their output rows as stacked.
        mlp_out: linear map whose input columns are the FFN's intermediate columns.
        mlp_rows: linear maps that feed ``mlp_out``, and the kinds of their output rows as stacked.
        head_norms: RMS norms over all heads at once, and the kind of their weights.
        head_parameters: further parameters with one row or entry per head, by name, and the kind of head.
        head_blocks: blocks that the stock class cuts the heads into, whatever their number.
        latent_attention: whether keys and values are computed from latents, which are cached in their place.
        kv_heads_key: configuration key of the number of kv heads; as many as query heads without it.
        layer_keys: configuration keys whose values the stock class takes from ``per_layer_config``.
        columns_key: configuration key of the FFN width; 4 times the hidden size where it is ``None``.
        fixed_width: whether the FFN of the stock class is 4 times as wide as the hidden size, without such a key.
        residual_inside: modules whose second argument is the residual, which they add to their output.
        head_biases: keyword arguments of the attention with a part for every head of the dense model, such as ALiBi;
            a pruned model selects the parts of the heads that it keeps.
        fixed_keys: configuration keys that a pruned model sets, and their values.
        experts: module with the 3-D parameters ``gate_up_proj`` and ``down_proj`` of a mixture of experts, if any.
        expert_layout: layout of these parameters.
        expert_columns_key: configuration key of the width of an expert; empty for families without experts.
        num_experts_key: configuration key of the number of experts.
        active_experts_key: configuration key of the number of experts of a token.
        router: module that chooses the experts of a token.
        router_tensors: its parameters and buffers with an entry per expert, and the dimension of these entries.
        fewest_experts: experts that the router needs at least, in each of its groups if it has some.
        experts_in: module that computes the inputs of the experts from those of the router, if they differ.
        shared_expert: FFN of every token beside the experts, with a gate, if any.
        shared_out: its linear map whose input columns are its intermediate columns.
        shared_rows: its linear maps that feed ``shared_out``, and the kinds of their output rows as stacked.
        shared_gate: linear map whose sigmoid weights the output of the shared expert, if any.
        shared_columns_key: configuration key of the width of the shared expert; where it is empty, the shared expert
            is as wide as ``shared_count_key`` experts, or as one.
        shared_count_key: configuration key of the number of experts that the shared expert is as wide as.
        heads_fill_hidden: whether the stock class sizes the attention by the hidden size, which the heads fill.
        head_counts: with ``heads_fill_hidden``, the attributes that hold a number of heads or entries, and its kind.
        unsupported: configuration keys that may not be set, and why.
        like: family whose layout the row repeats, in a row that is not part of the table.
    """

    base_type: str
    slim_type: str
    name: str
    config_class: str
    model_class: str
    causal_class: str
    layers: str = "model.layers"
    single_blocks: bool = False
    token_inputs: bool = False
    shared_states: str = ""
    tuple_outputs: bool = False
    transposed: bool = False
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
    head_parameters: tuple[tuple[str, str], ...] = ()
    head_blocks: int = 1
    latent_attention: bool = False
    kv_heads_key: str = "num_key_value_heads"
    layer_keys: tuple[str, ...] = ()
    columns_key: str = "intermediate_size"
    fixed_width: bool = False
    residual_inside: tuple[str, ...] = ()
    head_biases: tuple[str, ...] = ()
    fixed_keys: tuple[tuple[str, Any], ...] = ()
    experts: str = "mlp.experts"
    expert_layout: ExpertLayout = PLAIN_LAYOUT
    expert_columns_key: str = ""
    num_experts_key: str = "num_experts"
    active_experts_key: str = "num_experts_per_tok"
    router: str = "mlp.gate"
    router_tensors: tuple[tuple[str, int], ...] = (("weight", 0),)
    fewest_experts: int = 1
    experts_in: str = ""
    shared_expert: str = ""
    shared_out: str = "down_proj"
    shared_rows: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("gate_proj", (SHARED_COLUMNS,)),
        ("up_proj", (SHARED_COLUMNS,)),
    )
    shared_gate: str = ""
    shared_columns_key: str = ""
    shared_count_key: str = ""
    heads_fill_hidden: bool = False
    head_counts: tuple[tuple[str, str], ...] = ()
    unsupported: tuple[tuple[str, str], ...] = ()
    like: str = ""

    @property
    def slim_config(self) -> type[PreTrainedConfig]:
        """Configuration class of the pruned model."""
        from models.registry import slim_classes

        return slim_classes(self).config

    @property
    def slim_model(self) -> type[PreTrainedModel]:
        """Causal language model class of the pruned model, shipped inside the checkpoint."""
        from models.registry import slim_classes

        return slim_classes(self).causal

    def stored_dim(self, dim: int) -> int:
        """Return the dimension of a stored weight that holds the rows (0) or the columns (1) of its linear map.

        It is its own inverse.
        """
        return 1 - dim if self.transposed else dim

    @property
    def attention_block(self) -> str:
        """Module of a layer that contains the attention's output map."""
        return self.attention_out.rpartition(".")[0]

    @property
    def mlp_block(self) -> str:
        """Module of a layer that contains the FFN's output map; empty where the layer contains it directly."""
        return self.mlp_out.rpartition(".")[0]

    @property
    def shared_map(self) -> str:
        """Linear map whose input columns are those of the shared expert; empty without one."""
        return f"{self.shared_expert}.{self.shared_out}" if self.shared_expert else ""

    def decoder_layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the decoder layers of ``model``."""
        return model.get_submodule(self.layers)

    def has_head_biases(self, config: PreTrainedConfig) -> bool:
        """Return whether heads have biases of their own, which depend on their index."""
        return bool(self.head_biases) and getattr(config, "alibi", True)

    def has_attention(self, config: PreTrainedConfig, index: int) -> bool:
        """Return whether layer ``index`` has attention heads, not another mixer of tokens, or an FFN alone."""
        types = getattr(config, "layer_types", None)
        return not types or types[index] not in (*OTHER_MIXERS, *FFNS_ALONE)

    def has_ffn(self, config: PreTrainedConfig, index: int) -> bool:
        """Return whether layer ``index`` has an FFN, or experts."""
        return not self.single_blocks or config.layer_types[index] in FFNS_ALONE

    def kv_sharing(self, config: PreTrainedConfig, index: int) -> str:
        """Return what layer ``index`` does with keys and values: "store" them for later layers, "reuse" such, or ""."""
        num_reusing = config.num_kv_shared_layers if self.shared_states else 0
        if not num_reusing:
            return ""
        types, first_reusing = config.layer_types, config.num_hidden_layers - num_reusing
        if index >= first_reusing:
            return "reuse"
        # The last layer of each type that does not reuse stores.
        return "" if types[index] in types[index + 1 : first_reusing] else "store"

    def num_kv_heads(self, layer_config: PreTrainedConfig) -> int:
        """Return the number of kv heads of a layer; one in multi-query attention, whatever the key says."""
        if getattr(layer_config, "multi_query", False) and not getattr(layer_config, "new_decoder_architecture", False):
            return 1
        return getattr(layer_config, self.kv_heads_key, None) or layer_config.num_attention_heads

    def num_experts(self, config: PreTrainedConfig, index: int) -> int:
        """Return the number of experts of layer ``index``; 0 for a dense FFN."""
        if not self.expert_columns_key or index in (getattr(config, "mlp_only_layers", None) or ()):
            return 0
        if not getattr(config, "enable_moe_block", True):
            return 0
        if self.single_blocks:
            return getattr(config, self.num_experts_key) if config.layer_types[index] == "moe" else 0
        if hasattr(config, "layers_num_experts"):
            # A single one stands for a dense FFN.
            return config.layers_num_experts[index] if config.layers_num_experts[index] > 1 else 0
        first = getattr(config, "moe_layer_start_index", getattr(config, "first_k_dense_replace", 0))
        last = getattr(config, "moe_layer_end_index", config.num_hidden_layers - 1)
        step = getattr(config, "moe_layer_interval", getattr(config, "decoder_sparse_step", 1))
        sparse = first <= index <= last and (index + 1) % step == 0
        if hasattr(config, "moe_layers"):
            sparse = index in config.moe_layers
        return getattr(config, self.num_experts_key) if sparse else 0

    def num_expert_groups(self, config: PreTrainedConfig) -> int:
        """Return the number of groups of as many experts that the routers choose among; 1 without groups."""
        return getattr(config, "n_group", None) or 1

    def num_shared_columns(self, layer_config: PreTrainedConfig, kv_sharing: str = "") -> int:
        """Return the width of the shared expert of a layer with experts; 0 if it has none."""
        if not self.shared_expert:
            return 0
        if self.shared_columns_key:
            return _width_factor(layer_config, kv_sharing) * getattr(layer_config, self.shared_columns_key)
        count = getattr(layer_config, self.shared_count_key) if self.shared_count_key else 1
        return count * getattr(layer_config, self.expert_columns_key)

    def ffn_width(self, layer_config: PreTrainedConfig, num_experts: int, kv_sharing: str = "") -> int:
        """Return the FFN width of a layer, or that of each of ``num_experts`` experts."""
        key = self.width_key(num_experts)
        stored = getattr(layer_config, key, None) if self.fixed_width else getattr(layer_config, key)
        width = stored or 4 * layer_config.hidden_size
        if not num_experts:
            width *= _width_factor(layer_config, kv_sharing)
        if getattr(layer_config, "block_auto_adjust_ff_dim", False):
            # LFM2 derives the width of its gated FFN from that of one without a gate.
            width, multiple = 2 * width // 3, layer_config.block_multiple_of
            if layer_config.block_ffn_dim_multiplier is not None:
                width = -(-int(layer_config.block_ffn_dim_multiplier * width) // multiple) * multiple
        return width

    def width_key(self, num_experts: int) -> str:
        """Return the configuration key of the FFN width of a layer with ``num_experts`` experts."""
        return self.expert_columns_key if num_experts else self.columns_key


def _width_factor(layer_config: PreTrainedConfig, kv_sharing: str) -> int:
    """2 for a layer that reuses keys and values, where the dense FFNs of such layers are twice as wide; else 1."""
    return 2 if kv_sharing == "reuse" and layer_config.use_double_wide_mlp else 1


def row(base_type: str, name: str, **differences: Any) -> Family:
    """Return the row of model type ``base_type``, whose classes are called ``name``; other fields are LLaMA's."""
    classes = {
        "config_class": f"{name}Config",
        "model_class": f"{name}Model",
        "causal_class": f"{name}ForCausalLM",
    }
    return Family(**{"base_type": base_type, "slim_type": f"slim_{base_type}", "name": name, **classes, **differences})
