"""Mistral whose decoder layers differ in heads and FFN width; travels with a pruned checkpoint."""

# First: it names the library's version that the rest needs.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer


class SlimMistralConfig(SlimConfigMixin, MistralConfig):
    """``MistralConfig`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_mistral"


class SlimMistralModel(SlimModelMixin, MistralModel):
    """``MistralModel`` of unlike layers."""

    config: SlimMistralConfig
    layer_class = MistralDecoderLayer


class SlimMistralForCausalLM(SlimForCausalLMMixin, MistralForCausalLM):
    """``MistralForCausalLM`` around :class:`SlimMistralModel`."""

    config: SlimMistralConfig
    model_class = SlimMistralModel


SlimMistralConfig.register_for_auto_class("AutoConfig")
SlimMistralModel.register_for_auto_class("AutoModel")
SlimMistralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
