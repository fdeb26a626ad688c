"""Qwen2 and Qwen2.5 with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer


class SlimQwen2Config(SlimConfigMixin, Qwen2Config):
    """``Qwen2Config`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_qwen2"


class SlimQwen2Model(SlimModelMixin, Qwen2Model):
    """``Qwen2Model`` with per-layer shapes."""

    config: SlimQwen2Config
    layer_class = Qwen2DecoderLayer


class SlimQwen2ForCausalLM(SlimForCausalLMMixin, Qwen2ForCausalLM):
    """``Qwen2ForCausalLM`` around :class:`SlimQwen2Model`."""

    config: SlimQwen2Config
    model_class = SlimQwen2Model


SlimQwen2Config.register_for_auto_class("AutoConfig")
SlimQwen2Model.register_for_auto_class("AutoModel")
SlimQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
