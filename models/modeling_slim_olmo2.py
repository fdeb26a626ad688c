"""OLMo 2 with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

from typing import Any

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer


class SlimOlmo2Config(SlimConfigMixin, Olmo2Config):
    """``Olmo2Config`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_olmo2"


class SlimOlmo2Model(SlimModelMixin, Olmo2Model):
    """``Olmo2Model`` with per-layer shapes, whose query and key norms run over the remaining heads.

    With r the fraction of heads kept, the mean square over all heads (removed ones zero) is r times that over the
    remaining heads. To match the masked model, epsilon is divided by r; the norm weights are scaled when a model is
    shrunk.
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
