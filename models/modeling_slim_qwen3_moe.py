"""Qwen3-MoE whose decoder layers differ in heads and experts' width; travels with a pruned checkpoint."""

# First: it names the library's version that the rest needs.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

# The library looks for the words @use_experts_implementation in this file before it lets a user choose, as for its own
# class, how experts are computed; without them the choice would hang on which of the two classes is asked first.


class SlimQwen3MoeConfig(SlimConfigMixin, Qwen3MoeConfig):
    """``Qwen3MoeConfig`` with heads, kv heads, ``intermediate_size`` and ``moe_intermediate_size`` per layer."""

    model_type = "slim_qwen3_moe"


class SlimQwen3MoeModel(SlimModelMixin, Qwen3MoeModel):
    """``Qwen3MoeModel`` of unlike layers."""

    config: SlimQwen3MoeConfig
    layer_class = Qwen3MoeDecoderLayer


class SlimQwen3MoeForCausalLM(SlimForCausalLMMixin, Qwen3MoeForCausalLM):
    """``Qwen3MoeForCausalLM`` around :class:`SlimQwen3MoeModel`."""

    config: SlimQwen3MoeConfig
    model_class = SlimQwen3MoeModel


SlimQwen3MoeConfig.register_for_auto_class("AutoConfig")
SlimQwen3MoeModel.register_for_auto_class("AutoModel")
SlimQwen3MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
