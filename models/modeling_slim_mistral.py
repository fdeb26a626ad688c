"""Mistral with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer


class SlimMistralConfig(SlimConfigMixin, MistralConfig):
    """``MistralConfig`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_mistral"


class SlimMistralModel(SlimModelMixin, MistralModel):
    """``MistralModel`` with per-layer shapes."""

    config: SlimMistralConfig
    layer_class = MistralDecoderLayer


class SlimMistralForCausalLM(SlimForCausalLMMixin, MistralForCausalLM):
    """``MistralForCausalLM`` around :class:`SlimMistralModel`."""

    config: SlimMistralConfig
    model_class = SlimMistralModel


SlimMistralConfig.register_for_auto_class("AutoConfig")
SlimMistralModel.register_for_auto_class("AutoModel")
SlimMistralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
