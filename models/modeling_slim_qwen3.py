"""Qwen3 with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class SlimQwen3Config(SlimConfigMixin, Qwen3Config):
    """``Qwen3Config`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_qwen3"


class SlimQwen3Model(SlimModelMixin, Qwen3Model):
    """``Qwen3Model`` with per-layer shapes."""

    config: SlimQwen3Config
    layer_class = Qwen3DecoderLayer


class SlimQwen3ForCausalLM(SlimForCausalLMMixin, Qwen3ForCausalLM):
    """``Qwen3ForCausalLM`` around :class:`SlimQwen3Model`."""

    config: SlimQwen3Config
    model_class = SlimQwen3Model


SlimQwen3Config.register_for_auto_class("AutoConfig")
SlimQwen3Model.register_for_auto_class("AutoModel")
SlimQwen3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
