"""Mixtral with per-layer heads and expert widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

# transformers lets a user choose the experts implementation only if this file contains the text
# @use_experts_implementation; without it the choice depends on which of the two classes is used first.


class SlimMixtralConfig(SlimConfigMixin, MixtralConfig):
    """``MixtralConfig`` with heads, kv heads and the experts' ``intermediate_size`` per layer."""

    model_type = "slim_mixtral"


class SlimMixtralModel(SlimModelMixin, MixtralModel):
    """``MixtralModel`` with per-layer shapes."""

    config: SlimMixtralConfig
    layer_class = MixtralDecoderLayer


class SlimMixtralForCausalLM(SlimForCausalLMMixin, MixtralForCausalLM):
    """``MixtralForCausalLM`` around :class:`SlimMixtralModel`."""

    config: SlimMixtralConfig
    model_class = SlimMixtralModel


SlimMixtralConfig.register_for_auto_class("AutoConfig")
SlimMixtralModel.register_for_auto_class("AutoModel")
SlimMixtralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
