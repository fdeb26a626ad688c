"""Gemma 3 (text) with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer


class SlimGemma3Config(SlimConfigMixin, Gemma3TextConfig):
    """``Gemma3TextConfig`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_gemma3"


class SlimGemma3Model(SlimModelMixin, Gemma3TextModel):
    """``Gemma3TextModel`` with per-layer shapes."""

    config: SlimGemma3Config
    layer_class = Gemma3DecoderLayer


class SlimGemma3ForCausalLM(SlimForCausalLMMixin, Gemma3ForCausalLM):
    """``Gemma3ForCausalLM`` around :class:`SlimGemma3Model`."""

    config: SlimGemma3Config
    model_class = SlimGemma3Model


SlimGemma3Config.register_for_auto_class("AutoConfig")
SlimGemma3Model.register_for_auto_class("AutoModel")
SlimGemma3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
