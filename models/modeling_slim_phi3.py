"""Phi-3 and Phi-4 with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer


class SlimPhi3Config(SlimConfigMixin, Phi3Config):
    """``Phi3Config`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_phi3"


class SlimPhi3Model(SlimModelMixin, Phi3Model):
    """``Phi3Model`` with per-layer shapes."""

    config: SlimPhi3Config
    layer_class = Phi3DecoderLayer


class SlimPhi3ForCausalLM(SlimForCausalLMMixin, Phi3ForCausalLM):
    """``Phi3ForCausalLM`` around :class:`SlimPhi3Model`."""

    config: SlimPhi3Config
    model_class = SlimPhi3Model


SlimPhi3Config.register_for_auto_class("AutoConfig")
SlimPhi3Model.register_for_auto_class("AutoModel")
SlimPhi3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
