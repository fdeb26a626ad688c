"""LLaMA whose decoder layers differ in heads and FFN width; travels with a pruned checkpoint."""

# First: it names the library's version that the rest needs.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class SlimLlamaConfig(SlimConfigMixin, LlamaConfig):
    """``LlamaConfig`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_llama"


class SlimLlamaModel(SlimModelMixin, LlamaModel):
    """``LlamaModel`` of unlike layers."""

    config: SlimLlamaConfig
    layer_class = LlamaDecoderLayer


class SlimLlamaForCausalLM(SlimForCausalLMMixin, LlamaForCausalLM):
    """``LlamaForCausalLM`` around :class:`SlimLlamaModel`."""

    config: SlimLlamaConfig
    model_class = SlimLlamaModel


SlimLlamaConfig.register_for_auto_class("AutoConfig")
SlimLlamaModel.register_for_auto_class("AutoModel")
SlimLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
