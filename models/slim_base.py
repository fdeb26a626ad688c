"""Base classes of all pruned model families: decoder layers with per-layer heads and FFN widths.

This file ships inside a pruned checkpoint, beside that of the family. It only depends on ``transformers`` (>= 5.15, for
``per_layer_config``) and adds no modeling code: every layer is the library's class, built from its own entry.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 15):
    raise ImportError(
        f"a model pruned by SlimGPT needs transformers >= 5.15, for per-layer shapes; this is transformers "
        f"{transformers.__version__}: pip install --upgrade transformers"
    )

from torch import nn
from transformers import PreTrainedConfig

# transformers reads the top-level values when it validates or saves a config, and warns about its own reads.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
    lambda record: not record.getMessage().startswith("Reading global config value for per-layer attribute")
)

PER_LAYER_SIZES = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_dim",
)


class SlimConfigMixin:
    """Mixin of a family's configuration: heads, kv heads and FFN width per layer.

    Top-level values are those of the dense model; the sizes of each layer are in ``per_layer_config``.
    """

    allow_global_per_layer_attribute_access = True
    serialize_explicit_per_layer_config = True


class LayerConfigView:
    """View of the shared configuration with the sizes of one layer.

    ``per_layer_config[i]`` is a copy, which would not follow a later ``set_attn_implementation``.
    """

    def __init__(self, shared: PreTrainedConfig, index: int) -> None:
        self.shared = shared
        layer_config = shared.per_layer_config[index]
        for name in PER_LAYER_SIZES:
            if hasattr(layer_config, name):
                setattr(self, name, getattr(layer_config, name))

    def __getattr__(self, name: str) -> Any:
        if name == "shared":
            # Not set yet while the view is being copied.
            raise AttributeError(name)
        return getattr(self.shared, name)


def init_dense(init: Callable[..., None], config: PreTrainedConfig) -> None:
    """Run the dense ``init`` of the library's class, whose modules are rebuilt afterwards.

    The library consumes ``gradient_checkpointing`` and deletes it from ``config``; it is restored for the new modules.
    """
    checkpointing = getattr(config, "gradient_checkpointing", False)
    init(config)
    if checkpointing:
        config.gradient_checkpointing = checkpointing


class SlimModelMixin:
    """Mixin of a family's model: builds layer ``i`` from ``config.per_layer_config[i]``.

    Attributes:
        layer_class: decoder layer class of the family.
    """

    layer_class: type[nn.Module]
    post_init: Callable[[], None]

    def __init__(self, config: PreTrainedConfig) -> None:
        init_dense(super().__init__, config)
        self.layers = nn.ModuleList(
            self.layer_class(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        for i, layer in enumerate(self.layers):
            view = LayerConfigView(config, i)
            for module in layer.modules():
                if isinstance(getattr(module, "config", None), PreTrainedConfig):
                    module.config = view  # type: ignore[assignment]
        self.post_init()


class SlimForCausalLMMixin:
    """Mixin of a family's causal language model around its slim model.

    Attributes:
        model_class: class of the slim model.
    """

    model_class: type[nn.Module]
    post_init: Callable[[], None]

    def __init__(self, config: PreTrainedConfig) -> None:
        init_dense(super().__init__, config)
        self.model = self.model_class(config)
        self.post_init()
        share_lora_defaults(type(config))


def share_lora_defaults(config_class: type[PreTrainedConfig]) -> None:
    """Register the family's default LoRA targets for its slim model type, if peft is imported."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    types = [getattr(parent, "model_type", "") for parent in config_class.__mro__]
    base_type = next(model_type for model_type in types if model_type not in ("", config_class.model_type))
    if base_type in defaults:
        defaults.setdefault(config_class.model_type, defaults[base_type])
