"""Gemma 2 with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer


class SlimGemma2Config(SlimConfigMixin, Gemma2Config):
    """``Gemma2Config`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_gemma2"


class SlimGemma2Model(SlimModelMixin, Gemma2Model):
    """``Gemma2Model`` with per-layer shapes."""

    config: SlimGemma2Config
    layer_class = Gemma2DecoderLayer


class SlimGemma2ForCausalLM(SlimForCausalLMMixin, Gemma2ForCausalLM):
    """``Gemma2ForCausalLM`` around :class:`SlimGemma2Model`."""

    config: SlimGemma2Config
    model_class = SlimGemma2Model


SlimGemma2Config.register_for_auto_class("AutoConfig")
SlimGemma2Model.register_for_auto_class("AutoModel")
SlimGemma2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
