"""What the classes of all families share: decoder layers that differ in heads and FFN width.

This file travels with a pruned checkpoint, beside the family's own. It depends on ``transformers`` (>= 5.15, for
``per_layer_config``) alone, and adds no modeling code: every layer is the library's own, built from that layer's entry.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 15):
    raise ImportError(
        f"a model pruned by SlimGPT needs transformers >= 5.15, for layers that differ in shape; this is transformers "
        f"{transformers.__version__}: pip install --upgrade transformers"
    )

from torch import nn
from transformers import PreTrainedConfig

# The library reads the top-level values itself when it validates or saves a config, and then warns about its own reads.
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
    """A family's configuration with heads, kv heads and FFN width per layer.

    The values at the top level are those of the model before pruning; each layer's own are in ``per_layer_config``.
    """

    allow_global_per_layer_attribute_access = True
    serialize_explicit_per_layer_config = True


class LayerConfigView:
    """The shared configuration with one layer's own sizes.

    ``per_layer_config[i]`` is a copy, where a later ``set_attn_implementation`` would not show.
    """

    def __init__(self, shared: PreTrainedConfig, index: int) -> None:
        self.shared = shared
        own = shared.per_layer_config[index]
        for name in PER_LAYER_SIZES:
            if hasattr(own, name):
                setattr(self, name, getattr(own, name))

    def __getattr__(self, name: str) -> Any:
        if name == "shared":
            # Only while a copy is being made.
            raise AttributeError(name)
        return getattr(self.shared, name)


def init_dense(init: Callable[..., None], config: PreTrainedConfig) -> None:
    """Run a class's own ``init``, whose modules are then built anew.

    On its way the library obeys ``gradient_checkpointing`` and deletes it from ``config``; the new modules want it too.
    """
    checkpointing = getattr(config, "gradient_checkpointing", False)
    init(config)
    if checkpointing:
        config.gradient_checkpointing = checkpointing


class SlimModelMixin:
    """A family's model that builds layer ``i`` from ``config.per_layer_config[i]``.

    Attributes:
        layer_class: the library's decoder layer of the family.
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
    """A family's causal language model around its slim model.

    Attributes:
        model_class: the slim model.
    """

    model_class: type[nn.Module]
    post_init: Callable[[], None]

    def __init__(self, config: PreTrainedConfig) -> None:
        init_dense(super().__init__, config)
        self.model = self.model_class(config)
        self.post_init()
        share_lora_defaults(type(config))


def share_lora_defaults(config_class: type[PreTrainedConfig]) -> None:
    """Let peft, where it is imported, adapt by default the same maps of a slim model as of its family's own."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    types = [getattr(parent, "model_type", "") for parent in config_class.__mro__]
    base_type = next(model_type for model_type in types if model_type not in ("", config_class.model_type))
    if base_type in defaults:
        defaults.setdefault(config_class.model_type, defaults[base_type])
