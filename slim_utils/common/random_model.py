"""Models with random weights, for measurements that depend on shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WEIGHT_STD = 0.02


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Return a model of ``config`` on ``device``: matrices from a normal distribution, norms and biases of ones."""
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, WEIGHT_STD, generator=generator)
        else:
            parameter.data.fill_(1)
    return model
