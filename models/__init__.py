"""Thin model classes of pruned checkpoints, registered so that the suite loads them without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.modeling_slim_llama import SlimLlamaConfig, SlimLlamaForCausalLM, SlimLlamaModel

AutoConfig.register(SlimLlamaConfig.model_type, SlimLlamaConfig)
AutoModel.register(SlimLlamaConfig, SlimLlamaModel)
AutoModelForCausalLM.register(SlimLlamaConfig, SlimLlamaForCausalLM)

__all__ = ["SlimLlamaConfig", "SlimLlamaForCausalLM", "SlimLlamaModel"]
