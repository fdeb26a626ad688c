"""The default learning rate of runs on plain text, which follows the magnitude of a model's weights.

Adam moves a weight by about the learning rate, whatever its gradient, so that a rate fits weights of one magnitude.
Models differ in it: the root mean square of the matrices of SmolLM2-135M is 0.19, that of Gemma-3-270M 0.034.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import Tensor

from slim_utils.common.errors import UserError
from slim_utils.families import find_family
from slim_utils.layerwise.offload import ResidentModel
from train_utils.finetune_args import FinetuneArguments, TrainingArguments
from train_utils.text_defaults import LORA, SCALES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Measured by benchmarks/bench_recovery.py.
WEIGHT_RATE = 1.5e-3  # of the root mean square of the weights
LORA_RATE = 5e-4  # for weights of the magnitude 1 / sqrt(hidden size), at which matrices are commonly initialised
SCALE_RATE = 5e-3  # scales are factors of 1 at first: one rate for all models
_SAMPLED_ROWS = 64
# Of Mamba: logarithms of decay rates (channels, states), a hundred times as large as the entries of matrices.
_DECAY_RATES = ".A_log"
# Where the file of --deepspeed holds "auto" for the learning rate, the Trainer has put the value of the flag.
_DEEPSPEED_RATES = ("optimizer.params.lr", "scheduler.params.warmup_max_lr")


def set_text_learning_rate(args: FinetuneArguments, model: PreTrainedModel | ResidentModel) -> None:
    """Set the learning rate of ``args`` to the default for ``model``, whose weights are in memory or on disk.

    Raises:
        UserError: if the weights are not finite, naming one.
    """
    host, part = _host(model), args.model.trained_part
    magnitude = root_mean_square(layer_matrices(host))
    if not math.isfinite(magnitude):
        name = first_non_finite(_named_matrices(host)) or "a weight"
        raise UserError(f"model {args.model.model_name_or_path}: {name} is not finite")
    rate = text_learning_rate(part, magnitude, host.model.config.get_text_config().hidden_size)
    reason = "of scales" if part == SCALES else f"for weights with a root mean square of {magnitude:.2g}"
    logger.info("--learning_rate %g, the default %s", rate, reason)
    _replace_rate(args.training, rate)


def text_learning_rate(part: str, magnitude: float, hidden_size: int) -> float:
    """Default learning rate of a run on plain text, rounded to one digit.

    Args:
        part: what is trained, a key of :data:`train_utils.text_defaults.TRAINED_PARTS`.
        magnitude: root mean square of the model's weights.
        hidden_size: hidden size of the model.
    """
    rate = WEIGHT_RATE * magnitude
    if part == SCALES:
        rate = SCALE_RATE
    elif part == LORA:
        # An adapter starts as the product of zeros and of entries of about 1 / sqrt(hidden size): a step changes it by
        # about the rate / sqrt(hidden size).
        rate = LORA_RATE * magnitude * math.sqrt(hidden_size)
    return float(f"{rate:.0e}")


def layer_matrices(model: PreTrainedModel | ResidentModel) -> Iterator[Tensor]:
    """Weight matrices of the decoder layers, those of experts included; not the decay rates of Mamba."""
    return (tensor for _, tensor in _named_matrices(_host(model)))


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first of ``tensors`` with a value that is not finite; ``None`` if there is none."""
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)


def _host(model: PreTrainedModel | ResidentModel) -> ResidentModel:
    return model if isinstance(model, ResidentModel) else ResidentModel(model, find_family(model.config))


def _named_matrices(host: ResidentModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in host.sampled_tensors():
        if name.startswith(f"{host.family.layers}.") and tensor.ndim > 1 and not name.endswith(_DECAY_RATES):
            yield name, tensor


def root_mean_square(matrices: Iterable[Tensor]) -> float:
    """Root mean square of all values of ``matrices``, estimated from some rows of each."""
    total, size = 0.0, 0
    for matrix in matrices:
        rows = matrix.detach().flatten(0, -2)
        # Odd, so that it does not meet the same row of every expert.
        sample = rows[:: max(1, len(rows) // _SAMPLED_ROWS) | 1]
        total += sample.float().square().mean().item() * matrix.numel()
        size += matrix.numel()
    return math.sqrt(total / size)


def _replace_rate(training: TrainingArguments, rate: float) -> None:
    config = getattr(training, "hf_deepspeed_config", None)
    if config is not None:
        given = HfDeepSpeedConfig(training.deepspeed)
        for key in _DEEPSPEED_RATES:
            if given.get_value(key) == "auto":
                node, name = config.find_config_node(key)
                node[name] = rate
    training.learning_rate = rate
