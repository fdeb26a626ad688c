"""Trainer and callbacks: pruned weights stay exactly zero, logs are one line each, non-finite losses raise."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import (
    Seq2SeqTrainer,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.errors import RankError, UserError
from slim_utils.families import Family
from slim_utils.masks import LayerMask
from slim_utils.params_remove import Indices, count_weights, num_indices, removed_indices, select_indices, zero_indices
from train_utils.finetune_dataset import IGNORED_LABEL
from train_utils.learning_rate import first_non_finite

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.modeling_outputs import CausalLMOutput

logger = logging.getLogger(__name__)

SETTINGS_FILE = "run_settings.json"
HIDDEN_METRICS = ("_runtime", "_per_second", "total_flos")


@dataclass(frozen=True)
class MaskedSlice:
    """Rows or columns of one parameter (of each expert's slice for 3-D experts) that have to stay zero."""

    parameter: nn.Parameter
    dim: int
    indices: Indices

    def zero(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, which is shaped like the parameter, with the slice set to zero."""
        return zero_indices(tensor.clone(), self.dim, self.indices)

    def nonzeros(self) -> Tensor:
        """Number of nonzero weights in the slice, as a scalar on the device of the parameter."""
        return select_indices(self.parameter.data, self.dim, self.indices).count_nonzero()

    def size(self) -> int:
        """Number of weights in the slice."""
        return count_weights(self.parameter, self.dim, self.indices)


def masked_slices(model: PreTrainedModel | PeftModel, family: Family, masks: list[LayerMask]) -> Iterator[MaskedSlice]:
    """Slices of the parameters of ``model`` that pruning removed: columns, the rows that feed them, and their biases.

    For a linear module with LoRA adapters ``B·A``, columns are sliced from ``A`` and rows from ``B``.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer, mask in zip(family.decoder_layers(base), masks, strict=True):
        modules = dict(layer.named_modules())
        for name, (dim, indices) in removed_indices(family, mask).items():
            if not num_indices(indices):
                continue
            module_name, _, parameter_name = name.rpartition(".")
            # Not every layer of a family has all of its maps.
            module: Any = modules.get(module_name)
            if isinstance(module, LoraLayer):
                if parameter_name == "weight":
                    for adapter in module.active_adapters:
                        factor_dim = family.stored_dim(dim)
                        factor = (module.lora_A if factor_dim == 1 else module.lora_B)[adapter]
                        yield MaskedSlice(factor.weight, factor_dim, indices)
                module = module.get_base_layer()
            parameter = getattr(module, parameter_name, None)
            if parameter is not None:
                yield MaskedSlice(parameter, dim, indices)


class MaskCallback(TrainerCallback):
    """Keep slices at zero: their gradients are masked, and they are zeroed again after every optimizer step.

    With zero gradients from the first step on, momentum stays zero and weight decay has no effect, also on the fp32
    copies of a mixed-precision or ZeRO optimizer. Zeroing after the step covers optimizers that mix the columns of a
    gradient.

    Attributes:
        steps: number of optimizer steps.
        moved: number of weights that an optimizer step moved away from zero, summed over the steps.
    """

    def __init__(self, slices: list[MaskedSlice]) -> None:
        self.slices = slices
        self.steps = 0
        self.moved: Tensor | int = 0
        self.zero_slices()
        for masked in slices:
            if masked.parameter.requires_grad:
                masked.parameter.register_hook(masked.zero)

    @torch.no_grad()
    def zero_slices(self) -> None:
        """Set every slice to zero."""
        for masked in self.slices:
            zero_indices(masked.parameter, masked.dim, masked.indices)

    def nonzeros(self) -> int:
        """Number of nonzero weights in all slices."""
        return int(sum(masked.nonzeros() for masked in self.slices))

    def size(self) -> int:
        """Number of weights in all slices."""
        return sum(masked.size() for masked in self.slices)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Zero the slices, also after the weights of a checkpoint were loaded."""
        self.zero_slices()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Count the weights that moved, without a device synchronisation, and zero the slices."""
        self.steps += 1
        self.moved = self.moved + sum(masked.nonzeros() for masked in self.slices if masked.parameter.requires_grad)
        self.zero_slices()


class LogCallback(TrainerCallback):
    """Log every entry of the Trainer's log as one line."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log ``logs`` on rank 0, in the order of the Trainer."""
        if state.is_world_process_zero and logs:
            metrics = (f"{name} {value:.6g}" for name, value in logs.items() if not name.endswith(HIDDEN_METRICS))
            logger.info("step %d: %s", state.global_step, ", ".join(metrics))


class QuietProgress(ProgressCallback):
    """Progress bar without log output, which is left to :class:`LogCallback`."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""


def focal_loss(
    outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, gamma: float
) -> Tensor:
    """Mean over the targets of the cross-entropy weighted by ``(1 − p)^gamma`` (Lin et al. 2017, equation 4).

    Args:
        outputs: outputs of the model, with logits (batch, seqlen, vocabulary).
        labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` for non-targets.
        num_items_in_batch: divisor of the sum, the number of targets of a whole accumulated batch; ``None`` for the
            targets in ``labels``.
        gamma: exponent; 0 gives the cross-entropy.
    """
    logits = outputs.logits
    targets = labels[:, 1:].flatten().to(logits.device)
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    total = ((1 - torch.exp(-losses)) ** gamma * losses).sum()
    return total / ((targets != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch)


class SlimTrainer(Seq2SeqTrainer):
    """``Seq2SeqTrainer`` with one-line logs, and errors for losses and settings that cannot train.

    Args:
        focal_gamma: gamma of :func:`focal_loss`; ``None`` for the model's own loss.
        run_settings: settings that a resumed run may not change, stored in every checkpoint.

    Raises, in ``train``:
        UserError: for a non-finite loss, a batch without targets, or invalid settings of the optimizer or the schedule.
    """

    def __init__(
        self,
        *args: Any,
        focal_gamma: float | None = None,
        run_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = None if focal_gamma is None else partial(focal_loss, gamma=focal_gamma)
        super().__init__(*args, compute_loss_func=loss, **kwargs)
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(QuietProgress)
        self.add_callback(LogCallback)
        self.run_settings = run_settings

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate, which by itself ignores FSDP on CPUs."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and getattr(state, "fsdp_plugin", None) is None:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of ``--optim`` and ``--optim_args``."""
        with _one_line_errors(f"--optim {getattr(self.args.optim, 'value', self.args.optim)}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The schedule of ``--lr_scheduler_type`` and ``--lr_scheduler_kwargs``."""
        with _one_line_errors(f"--lr_scheduler_type {getattr(self.args.lr_scheduler_type, 'value', '')}"):
            return super().create_scheduler(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Loss of one forward and backward pass; checks the targets and the loss."""
        if not (inputs["labels"][:, 1:] != IGNORED_LABEL).any():
            raise RankError(f"step {self.state.global_step + 1}: batch without targets; raise --max_length")
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss.item()):
            failure = f"step {self.state.global_step + 1}: the loss is {loss.item()}"
            # Sharded parameters are not looked at.
            whole = (named for named in model.named_parameters() if not isinstance(named[1].data, DTensor))
            if self.state.global_step == 0 and (name := first_non_finite(whole)):
                raise RankError(f"{failure}: {name} of the model to train is not finite")
            raise RankError(
                f"{failure}; lower --learning_rate or --max_grad_norm, or use --bf16 true instead of --fp16 true"
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; remove a partial one on failure (full disk, Ctrl-C, SIGTERM)."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.process_index == 0 and self.run_settings is not None:
                # Written before the Trainer's files, the last of which marks the checkpoint as complete.
                folder.mkdir(parents=True, exist_ok=True)
                write_json_atomic(folder / SETTINGS_FILE, self.run_settings)
            super()._save_checkpoint(*args, **kwargs)
        except BaseException:
            if self.args.process_index == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _one_line_errors(flag: str) -> Iterator[None]:
    """Re-raise the library's errors about the value of ``flag`` as a one-line :class:`UserError`."""
    try:
        yield
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{flag}: {' '.join(str(error).split())}") from error
