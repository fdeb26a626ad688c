"""Qwen3-MoE with per-layer heads and expert widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

# transformers lets a user choose the experts implementation only if this file contains the text
# @use_experts_implementation; without it the choice depends on which of the two classes is used first.


class SlimQwen3MoeConfig(SlimConfigMixin, Qwen3MoeConfig):
    """``Qwen3MoeConfig`` with heads, kv heads, ``intermediate_size`` and ``moe_intermediate_size`` per layer."""

    model_type = "slim_qwen3_moe"


class SlimQwen3MoeModel(SlimModelMixin, Qwen3MoeModel):
    """``Qwen3MoeModel`` with per-layer shapes."""

    config: SlimQwen3MoeConfig
    layer_class = Qwen3MoeDecoderLayer


class SlimQwen3MoeForCausalLM(SlimForCausalLMMixin, Qwen3MoeForCausalLM):
    """``Qwen3MoeForCausalLM`` around :class:`SlimQwen3MoeModel`."""

    config: SlimQwen3MoeConfig
    model_class = SlimQwen3MoeModel


SlimQwen3MoeConfig.register_for_auto_class("AutoConfig")
SlimQwen3MoeModel.register_for_auto_class("AutoModel")
SlimQwen3MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
