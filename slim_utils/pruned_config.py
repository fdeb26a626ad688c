"""Configuration of the pruned model: with per-layer shapes, or of the stock class for uniform ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from slim_utils.common.errors import UserError
from slim_utils.families import Family
from slim_utils.masks import LayerMask
from slim_utils.routers import active_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Keys of the dense configuration that do not apply to the pruned model.
_DENSE_ONLY_KEYS = ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version")


def slim_config(config: PreTrainedConfig, family: Family, masks: list[LayerMask]) -> PreTrainedConfig:
    """Return the configuration of the pruned model, with per-layer shapes.

    ``layer_head_num`` and ``layer_inter_size`` list the heads and the FFN width of every layer.
    """
    slim = family.slim_config(**per_layer_fields(config, family, masks))
    slim.architectures = [family.slim_model.__name__]
    # save_pretrained adds the other two classes; vLLM loads AutoModel.
    slim.auto_map = {"AutoModel": _auto_model_reference(family)}
    return slim


def per_layer_fields(config: PreTrainedConfig, family: Family, masks: list[LayerMask]) -> dict[str, Any]:
    """Return the fields of the configuration of the pruned model, with per-layer shapes.

    The top level keeps the sizes of the dense base, also for a model that was pruned before.
    """
    per_layer = _stock_layers(config, family)
    for index, mask in enumerate(masks):
        per_layer.setdefault(index, {}).update(_layer_sizes(config, family, mask))
        if family.has_head_biases(config):
            # Of a model that was pruned before, indices into those of the dense model.
            heads = getattr(config.per_layer_config[index], "kept_heads", range(mask.shape.num_heads))
            per_layer[index]["kept_heads"] = [heads[head] for head in mask.kept_heads]
    return {**_shared_fields(config, family, masks), "per_layer_config": per_layer}


def stock_config(config: PreTrainedConfig, family: Family, masks: list[LayerMask]) -> PreTrainedConfig:
    """Return the configuration of the pruned model in the stock class of transformers, for uniform layers.

    A LLaMA whose number of heads does not divide its hidden size becomes a Mistral, which has the same weights.

    Raises:
        UserError: if the layer shapes differ, or the stock class does not allow them.
    """
    sizes: dict[str, int] = {}
    per_layer = _stock_layers(config, family)
    all_sizes = [_layer_sizes(config, family, mask) for mask in masks]
    # FFNs of layers that reuse keys and values are then twice as wide, unless the pruned ones are all of one width.
    widths = {layer_sizes.get(family.columns_key) for layer_sizes in all_sizes}
    doubled = getattr(config, "use_double_wide_mlp", False) and len(widths) > 1
    for index, (mask, layer_sizes) in enumerate(zip(masks, all_sizes, strict=True)):
        if doubled and mask.shape.kv_sharing == "reuse" and layer_sizes[family.columns_key] % 2 == 0:
            layer_sizes[family.columns_key] //= 2
        for key in per_layer.get(index, {}).keys() & layer_sizes.keys():
            per_layer[index][key] = layer_sizes.pop(key)
        if any(sizes.setdefault(key, size) != size for key, size in layer_sizes.items()):
            # Dense FFNs and experts, which lose columns in other multiples, may share the key of their width.
            shared = family.expert_columns_key == family.columns_key
            advice = "use --sparsity on all layers" + (", with --multiple_of 8" if shared else "")
            raise UserError(f"--uniform_shapes: the pruned layers differ in shape; {advice}")
    fields = _shared_fields(config, family, masks) | sizes
    if per_layer:
        fields |= per_layer[0] | {"per_layer_config": per_layer}
    if doubled:
        fields["use_double_wide_mlp"] = True
    heads, hidden = fields["num_attention_heads"], config.hidden_size
    fits = not family.heads_fill_hidden or heads * fields["head_dim"] == hidden
    if fits and family.fixed_width and sizes[family.columns_key] != 4 * hidden:
        message = f"--uniform_shapes: a stock {family.base_type} has {4 * hidden} FFN columns"
        raise UserError(f"{message}; remove --uniform_shapes")
    try:
        if not fits:
            raise ValueError("the heads do not fill the hidden size")
        return AutoConfig.for_model(family.base_type, **fields)
    except (ValueError, StrictDataclassError) as error:
        has_biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
        if family.base_type == "llama" and not has_biases:
            return AutoConfig.for_model("mistral", **fields, sliding_window=None)
        raise UserError(
            f"--uniform_shapes: a stock {family.base_type} cannot have {heads} heads with a hidden size of {hidden}; "
            "change --sparsity or remove --uniform_shapes"
        ) from error


def _shared_fields(config: PreTrainedConfig, family: Family, masks: list[LayerMask]) -> dict[str, Any]:
    fields = {key: value for key, value in config.to_dict().items() if key not in _DENSE_ONLY_KEYS}
    if not family.latent_attention:
        fields["head_dim"] = masks[0].shape.head_dim
    fields["layer_head_num"] = [len(mask.kept_heads) for mask in masks]
    fields["layer_inter_size"] = [mask.kept_width for mask in masks]
    num_experts = {len(mask.kept_experts) for mask in masks if mask.shape.num_experts}
    fields |= dict(family.fixed_keys)
    if len(num_experts) > 1:
        raise ValueError(f"layers with {' and '.join(map(str, sorted(num_experts)))} experts")
    for kept in num_experts:
        sizes = {family.num_experts_key: kept, family.active_experts_key: active_experts(config, family, kept)}
        # A configuration stores some keys under other names.
        fields |= {config.attribute_map.get(key, key): size for key, size in sizes.items()}
    return fields


def _stock_layers(config: PreTrainedConfig, family: Family) -> dict[int, dict[str, Any]]:
    """What the stock class takes from ``per_layer_config``, by layer."""
    if not family.layer_keys:
        return {}
    layers = enumerate(config.per_layer_config)
    return {index: {key: getattr(layer, key) for key in family.layer_keys} for index, layer in layers}


def _layer_sizes(config: PreTrainedConfig, family: Family, mask: LayerMask) -> dict[str, int]:
    # Layers have the sizes of the top level where they do not use them.
    sizes = {family.width_key(mask.shape.num_experts): mask.kept_width} if mask.shape.num_columns else {}
    if mask.shape.num_experts and family.shared_columns_key:
        sizes[family.shared_columns_key] = len(mask.kept_shared)
    if mask.shape.num_heads:
        sizes["num_attention_heads"] = len(mask.kept_heads)
        if hasattr(config.per_layer_config[0], family.kv_heads_key):
            sizes[family.kv_heads_key] = len(mask.kept_kv_heads)
    return sizes


def _auto_model_reference(family: Family) -> str:
    module = family.slim_model.__module__.rsplit(".", 1)[-1]
    return f"{module}.{family.slim_model.__name__.removesuffix('ForCausalLM')}Model"
