"""Granite whose decoder layers differ in heads and FFN width; travels with a pruned checkpoint."""

# First: it names the library's version that the rest needs.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel
from transformers.models.granite.modeling_granite import GraniteDecoderLayer


class SlimGraniteConfig(SlimConfigMixin, GraniteConfig):
    """``GraniteConfig`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_granite"


class SlimGraniteModel(SlimModelMixin, GraniteModel):
    """``GraniteModel`` of unlike layers."""

    config: SlimGraniteConfig
    layer_class = GraniteDecoderLayer


class SlimGraniteForCausalLM(SlimForCausalLMMixin, GraniteForCausalLM):
    """``GraniteForCausalLM`` around :class:`SlimGraniteModel`."""

    config: SlimGraniteConfig
    model_class = SlimGraniteModel


SlimGraniteConfig.register_for_auto_class("AutoConfig")
SlimGraniteModel.register_for_auto_class("AutoModel")
SlimGraniteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
