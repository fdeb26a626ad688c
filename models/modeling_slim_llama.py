"""LLaMA with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class SlimLlamaConfig(SlimConfigMixin, LlamaConfig):
    """``LlamaConfig`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_llama"


class SlimLlamaModel(SlimModelMixin, LlamaModel):
    """``LlamaModel`` with per-layer shapes."""

    config: SlimLlamaConfig
    layer_class = LlamaDecoderLayer


class SlimLlamaForCausalLM(SlimForCausalLMMixin, LlamaForCausalLM):
    """``LlamaForCausalLM`` around :class:`SlimLlamaModel`."""

    config: SlimLlamaConfig
    model_class = SlimLlamaModel


SlimLlamaConfig.register_for_auto_class("AutoConfig")
SlimLlamaModel.register_for_auto_class("AutoModel")
SlimLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
