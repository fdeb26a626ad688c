"""LLaMA whose decoder layers differ in heads and FFN width: the code that travels with a pruned checkpoint.

This file depends on ``transformers`` (>= 5.15, for ``per_layer_config``) alone, and is copied next to the weights, so
``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` needs nothing else. It adds no modeling
code: every layer is the stock ``LlamaDecoderLayer``, built from that layer's own configuration.
"""

import logging

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# The library reads the top-level values itself when it validates or saves a config, and then warns about its own reads.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
    lambda record: not record.getMessage().startswith("Reading global config value for per-layer attribute")
)


class SlimLlamaConfig(LlamaConfig):
    """``LlamaConfig`` with ``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size`` per layer.

    The values at the top level are those of the model before pruning; each layer's own are in ``per_layer_config``.
    """

    model_type = "slim_llama"
    allow_global_per_layer_attribute_access = True
    serialize_explicit_per_layer_config = True


class SlimLlamaModel(LlamaModel):
    """``LlamaModel`` that builds layer ``i`` from ``config.per_layer_config[i]``."""

    config: SlimLlamaConfig

    def __init__(self, config: SlimLlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        for layer in self.layers:
            # The layer's own config is a copy; the shared one is where `set_attn_implementation` takes effect.
            layer.self_attn.config = config
        self.post_init()


class SlimLlamaForCausalLM(LlamaForCausalLM):
    """``LlamaForCausalLM`` around :class:`SlimLlamaModel`."""

    config: SlimLlamaConfig

    def __init__(self, config: SlimLlamaConfig) -> None:
        super().__init__(config)
        self.model = SlimLlamaModel(config)
        self.post_init()


SlimLlamaConfig.register_for_auto_class("AutoConfig")
SlimLlamaModel.register_for_auto_class("AutoModel")
SlimLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
