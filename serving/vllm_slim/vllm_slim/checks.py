"""Checks of a checkpoint against the engine's configuration, made before any worker starts."""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_slim.sizes import check_tensor_parallel, layer_sizes


class SlimChecks(VerifyAndUpdateConfig):
    """Checks of all architectures."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the division of layers among devices, and the data type.

        Raises:
            ValueError: if a layer does not divide, or fp16 is requested for Gemma, whose activations overflow in it.
        """
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        sizes = layer_sizes(model.hf_text_config, experts_whole=parallel.enable_expert_parallel)
        check_tensor_parallel(sizes, parallel.tensor_parallel_size, model.hf_text_config.num_attention_heads)
        if "gemma" in model.hf_text_config.model_type and model.dtype == torch.float16:
            raise ValueError("Gemma overflows in float16; use --dtype bfloat16 or --dtype float32")
