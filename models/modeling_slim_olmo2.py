"""OLMo 2 whose decoder layers differ in heads and FFN width; travels with a pruned checkpoint."""

from typing import Any

# First: it names the library's version that the rest needs.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer


class SlimOlmo2Config(SlimConfigMixin, Olmo2Config):
    """``Olmo2Config`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_olmo2"


class SlimOlmo2Model(SlimModelMixin, Olmo2Model):
    """``Olmo2Model`` of unlike layers, whose query and key norms run over the heads that are left.

    The mean square over those, times their share, is that over all heads with the others at zero. So that both models
    add the same epsilon, this one's is divided by that share; the norms' weights are scaled when a model is shrunk.
    """

    config: SlimOlmo2Config
    layer_class = Olmo2DecoderLayer

    def __init__(self, config: SlimOlmo2Config) -> None:
        super().__init__(config)
        for layer in self.layers:
            attention: Any = layer.self_attn
            norms = (attention.q_norm, config.num_attention_heads), (attention.k_norm, config.num_key_value_heads)
            for norm, dense_heads in norms:
                norm.variance_epsilon *= dense_heads * attention.head_dim / norm.weight.numel()


class SlimOlmo2ForCausalLM(SlimForCausalLMMixin, Olmo2ForCausalLM):
    """``Olmo2ForCausalLM`` around :class:`SlimOlmo2Model`."""

    config: SlimOlmo2Config
    model_class = SlimOlmo2Model


SlimOlmo2Config.register_for_auto_class("AutoConfig")
SlimOlmo2Model.register_for_auto_class("AutoModel")
SlimOlmo2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
