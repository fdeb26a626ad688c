"""SmolLM3 with per-layer heads and FFN widths; ships inside a pruned checkpoint."""

# Imported first: it checks the version of transformers.
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

# isort: split
from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer


class SlimSmolLM3Config(SlimConfigMixin, SmolLM3Config):
    """``SmolLM3Config`` with heads, kv heads and ``intermediate_size`` per layer."""

    model_type = "slim_smollm3"


class SlimSmolLM3Model(SlimModelMixin, SmolLM3Model):
    """``SmolLM3Model`` with per-layer shapes."""

    config: SlimSmolLM3Config
    layer_class = SmolLM3DecoderLayer


class SlimSmolLM3ForCausalLM(SlimForCausalLMMixin, SmolLM3ForCausalLM):
    """``SmolLM3ForCausalLM`` around :class:`SlimSmolLM3Model`."""

    config: SlimSmolLM3Config
    model_class = SlimSmolLM3Model


SlimSmolLM3Config.register_for_auto_class("AutoConfig")
SlimSmolLM3Model.register_for_auto_class("AutoModel")
SlimSmolLM3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
