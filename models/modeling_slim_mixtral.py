"""Mixtral whose decoder layers differ in heads and experts' width; travels with a pruned checkpoint."""

# First: it names the library's version that the rest needs.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

# The library looks for the words @use_experts_implementation in this file before it lets a user choose, as for its own
# class, how experts are computed; without them the choice would hang on which of the two classes is asked first.


class SlimMixtralConfig(SlimConfigMixin, MixtralConfig):
    """``MixtralConfig`` with heads, kv heads and the experts' ``intermediate_size`` per layer."""

    model_type = "slim_mixtral"


class SlimMixtralModel(SlimModelMixin, MixtralModel):
    """``MixtralModel`` of unlike layers."""

    config: SlimMixtralConfig
    layer_class = MixtralDecoderLayer


class SlimMixtralForCausalLM(SlimForCausalLMMixin, MixtralForCausalLM):
    """``MixtralForCausalLM`` around :class:`SlimMixtralModel`."""

    config: SlimMixtralConfig
    model_class = SlimMixtralModel


SlimMixtralConfig.register_for_auto_class("AutoConfig")
SlimMixtralModel.register_for_auto_class("AutoModel")
SlimMixtralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
