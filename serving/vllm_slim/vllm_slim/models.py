"""One class per architecture: vLLM's class of the family, with layers of their own sizes."""

from collections.abc import Iterable
from functools import partial

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import gemma, gemma2, gemma3, granite, mixtral, qwen3_moe
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model
from vllm.model_executor.models.utils import WeightsMapper

from vllm_slim.layers import SmolLM3Attention, per_layer, substituted
from vllm_slim.olmo import OlmoDecoderLayer


class SlimLlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = per_layer(LlamaDecoderLayer, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class SlimMistralForCausalLM(MistralForCausalLM):
    """Mistral with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = per_layer(MistralDecoderLayer, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class SlimQwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 with per-layer shapes.

    vLLM's Qwen2 takes the size of a head from the hidden size and the number of heads; its LLaMA does not, and has the
    biases of Qwen2.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = per_layer(LlamaDecoderLayer, vllm_config, qkv_bias=True)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class SlimSmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM3 with per-layer shapes: vLLM's LLaMA, with layers that have no rotary embedding."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = partial(per_layer(LlamaDecoderLayer, vllm_config), attn_layer_type=SmolLM3Attention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class SlimOlmo2ForCausalLM(LlamaForCausalLM):
    """OLMo 2 with per-layer shapes: vLLM's LLaMA, with layers of its own."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = per_layer(OlmoDecoderLayer, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class SlimOlmo3ForCausalLM(SlimOlmo2ForCausalLM):
    """OLMo 3 with per-layer shapes."""


class SlimPhi3ForCausalLM(Phi3ForCausalLM):
    """Phi-3 with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = per_layer(LlamaDecoderLayer, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class SlimQwen3ForCausalLM(Qwen3ForCausalLM):
    """Qwen3 with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with substituted(Qwen3Model, "decoder_layer_type", per_layer(Qwen3DecoderLayer, vllm_config)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class SlimGemmaForCausalLM(gemma.GemmaForCausalLM):
    """Gemma with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with substituted(gemma, "GemmaDecoderLayer", per_layer(gemma.GemmaDecoderLayer, vllm_config)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class SlimGemma2ForCausalLM(gemma2.Gemma2ForCausalLM):
    """Gemma 2 with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with substituted(gemma2, "Gemma2DecoderLayer", per_layer(gemma2.Gemma2DecoderLayer, vllm_config)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class SlimGemma3ForCausalLM(gemma3.Gemma3ForCausalLM):
    """Gemma 3 (text) with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with substituted(gemma3, "Gemma3DecoderLayer", per_layer(gemma3.Gemma3DecoderLayer, vllm_config)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class SlimGraniteForCausalLM(granite.GraniteForCausalLM):
    """Granite with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with substituted(granite, "GraniteDecoderLayer", per_layer(granite.GraniteDecoderLayer, vllm_config)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class SlimMixtralForCausalLM(mixtral.MixtralForCausalLM):
    """Mixtral with per-layer shapes; in checkpoints, experts are 3-D tensors under the names of transformers."""

    _names = WeightsMapper(
        orig_to_new_substr={
            ".mlp.experts.gate_up_proj": ".block_sparse_moe.experts.w13",
            ".mlp.experts.down_proj": ".block_sparse_moe.experts.w2",
            ".mlp.gate.": ".block_sparse_moe.gate.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with substituted(mixtral, "MixtralDecoderLayer", per_layer(mixtral.MixtralDecoderLayer, vllm_config)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint's tensors, given by their names; returns the names of the parameters."""
        return super().load_weights(self._names.apply(weights))


class SlimQwen3MoeForCausalLM(qwen3_moe.Qwen3MoeForCausalLM):
    """Qwen3-MoE with per-layer shapes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = per_layer(qwen3_moe.Qwen3MoeDecoderLayer, vllm_config)
        model = partial(qwen3_moe.Qwen3MoeModel, decoder_layer_type=layer)
        with substituted(qwen3_moe, "Qwen3MoeModel", model):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
