"""Granite with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel
from transformers.models.granite.modeling_granite import GraniteDecoderLayer


class SlimGraniteConfig(SlimConfigMixin, GraniteConfig):
    """``GraniteConfig`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_granite"


class SlimGraniteModel(SlimModelMixin, GraniteModel):
    """``GraniteModel`` with per-layer shapes."""

    config: SlimGraniteConfig
    layer_class = GraniteDecoderLayer


class SlimGraniteForCausalLM(SlimForCausalLMMixin, GraniteForCausalLM):
    """``GraniteForCausalLM`` around :class:`SlimGraniteModel`."""

    config: SlimGraniteConfig
    model_class = SlimGraniteModel


SlimGraniteConfig.register_for_auto_class("AutoConfig")
SlimGraniteModel.register_for_auto_class("AutoModel")
SlimGraniteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
