"""OPT with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin, init_dense

# isort: split
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel
from transformers.models.opt.modeling_opt import OPTDecoder, OPTDecoderLayer


class SlimOPTConfig(SlimConfigMixin, OPTConfig):
    """``OPTConfig`` with ``num_attention_heads`` and ``ffn_dim`` per layer."""

    model_type = "slim_opt"


class SlimOPTDecoderLayer(OPTDecoderLayer):
    """``OPTDecoderLayer`` whose heads need not fill the hidden size; the library's class would widen them."""

    def __init__(self, config: SlimOPTConfig, layer_idx: int) -> None:
        num_heads, config.num_attention_heads = config.num_attention_heads, config.hidden_size // config.head_dim
        super().__init__(config, layer_idx)
        config.num_attention_heads = num_heads
        attention, width, bias = self.self_attn, num_heads * config.head_dim, config.enable_bias
        attention.num_heads = num_heads
        attention.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        attention.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        attention.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        attention.out_proj = nn.Linear(width, config.hidden_size, bias=bias)


class SlimOPTDecoder(SlimModelMixin, OPTDecoder):
    """``OPTDecoder`` with per-layer shapes."""

    config: SlimOPTConfig
    layer_class = SlimOPTDecoderLayer


class SlimOPTModel(OPTModel):
    """``OPTModel`` around :class:`SlimOPTDecoder`."""

    config: SlimOPTConfig

    def __init__(self, config: SlimOPTConfig) -> None:
        init_dense(super().__init__, config)
        self.decoder = SlimOPTDecoder(config)
        self.post_init()


class SlimOPTForCausalLM(SlimForCausalLMMixin, OPTForCausalLM):
    """``OPTForCausalLM`` around :class:`SlimOPTModel`."""

    config: SlimOPTConfig
    model_class = SlimOPTModel


SlimOPTConfig.register_for_auto_class("AutoConfig")
SlimOPTModel.register_for_auto_class("AutoModel")
SlimOPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
