"""A Trainer that keeps pruned weights at exactly zero, and stops where a loss says nothing."""

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
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Seq2SeqTrainer,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from slim_utils.common.errors import UserError
from slim_utils.common.loading import write_json_atomic
from slim_utils.families import Family
from slim_utils.masks import LayerMask
from slim_utils.params_remove import removed_indices, select_indices, zero_indices
from train_utils.finetune_dataset import IGNORED_LABEL

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
UNTOLD_FIGURES = ("_runtime", "_per_second", "total_flos")


@dataclass(frozen=True)
class MaskedSlice:
    """Rows or columns of one parameter, of an expert's slice or a whole one, that have to stay zero."""

    parameter: nn.Parameter
    dim: int
    indices: Tensor

    def zero(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, shaped like the parameter, with the slice at zero."""
        return zero_indices(tensor.clone(), self.dim, self.indices)

    def nonzeros(self) -> Tensor:
        """How many of the slice's weights are not zero, a scalar on the parameter's device."""
        return select_indices(self.parameter.data, self.dim, self.indices).count_nonzero()

    def size(self) -> int:
        """Weights of the slice."""
        return self.parameter.numel() // self.parameter.shape[self.dim] * self.indices.shape[-1]


def masked_slices(model: PreTrainedModel | PeftModel, family: Family, masks: list[LayerMask]) -> Iterator[MaskedSlice]:
    """Every slice of ``model``'s parameters that pruning removed: columns, the rows that feed them, and their biases.

    Where a linear map carries LoRA adapters ``B·A``, a column of the product is a column of ``A`` and a row is one of
    ``B``.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer, mask in zip(family.decoder_layers(base), masks, strict=True):
        for name, (dim, indices) in removed_indices(family, mask).items():
            if not indices.numel():
                continue
            owner, _, own_name = name.rpartition(".")
            module = layer.get_submodule(owner)
            if isinstance(module, LoraLayer):
                if own_name == "weight":
                    for adapter in module.active_adapters:
                        factor = (module.lora_A if dim == 1 else module.lora_B)[adapter]
                        yield MaskedSlice(factor.weight, dim, indices)
                module = module.get_base_layer()
            parameter = getattr(module, own_name)
            if parameter is not None:
                yield MaskedSlice(parameter, dim, indices)


class MaskCallback(TrainerCallback):
    """Keeps slices at zero: no gradient reaches them, and what an optimizer moves all the same is put back.

    Without a gradient from the first step on, momentum stays zero and weight decay has nothing to act on; this holds
    for the fp32 copies of a mixed-precision or ZeRO optimizer too. Putting back covers the optimizers that mix the
    columns of a gradient.

    Attributes:
        steps: optimizer steps seen.
        moved: weights that an optimizer step had moved away from zero, summed over the steps.
    """

    def __init__(self, slices: list[MaskedSlice]) -> None:
        self.slices = slices
        self.steps = 0
        self.moved: Tensor | int = 0
        self.put_back()
        for masked in slices:
            if masked.parameter.requires_grad:
                masked.parameter.register_hook(masked.zero)

    @torch.no_grad()
    def put_back(self) -> None:
        """Zero every slice."""
        for masked in self.slices:
            zero_indices(masked.parameter, masked.dim, masked.indices)

    def nonzeros(self) -> int:
        """Weights of the slices that are not zero now."""
        return int(sum(masked.nonzeros() for masked in self.slices))

    def size(self) -> int:
        """Weights of all slices."""
        return sum(masked.size() for masked in self.slices)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Also after the weights of a checkpoint came in."""
        self.put_back()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Count what moved, without waiting for the device, and put it back."""
        self.steps += 1
        self.moved = self.moved + sum(masked.nonzeros() for masked in self.slices if masked.parameter.requires_grad)
        self.put_back()


class LogCallback(TrainerCallback):
    """One line a log entry, through ``logging``."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log ``logs`` in the order that the Trainer gives them."""
        if state.is_world_process_zero and logs:
            figures = (f"{name} {value:.6g}" for name, value in logs.items() if not name.endswith(UNTOLD_FIGURES))
            logger.info("step %d: %s", state.global_step, ", ".join(figures))


class QuietProgress(ProgressCallback):
    """The progress bar alone; :class:`LogCallback` logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


def focal_loss(
    outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, gamma: float
) -> Tensor:
    """Cross-entropy of every target weighed by ``(1 − p)^gamma`` (Lin et al. 2017, equation 4), over all targets.

    Args:
        outputs: of the model, with logits (batch, seqlen, vocabulary).
        labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` where there is no target.
        num_items_in_batch: to divide the sum by, the targets of a whole accumulated batch; ``None`` for those of
            ``labels``.
        gamma: 0 gives the cross-entropy.
    """
    logits = outputs.logits
    targets = labels[:, 1:].flatten().to(logits.device)
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    total = ((1 - torch.exp(-losses)) ** gamma * losses).sum()
    return total / ((targets != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch)


class SlimTrainer(Seq2SeqTrainer):
    """The library's Trainer with one line a log entry, and a clear end where training says nothing.

    Args:
        focal_gamma: of :func:`focal_loss`; ``None`` for the model's own loss.
        run_settings: what a run that goes on from a checkpoint may not change.

    Raises, in ``train``:
        UserError: at a loss that is not finite, a batch without a target, or an optimizer or a schedule that the
            library refuses.
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

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of ``--optim`` and ``--optim_args``."""
        with _refusal(f"--optim {getattr(self.args.optim, 'value', self.args.optim)}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The schedule of ``--lr_scheduler_type`` and ``--lr_scheduler_kwargs``."""
        with _refusal(f"--lr_scheduler_type {getattr(self.args.lr_scheduler_type, 'value', '')}"):
            return super().create_scheduler(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward, checked."""
        if not (inputs["labels"][:, 1:] != IGNORED_LABEL).any():
            raise UserError(f"step {self.state.global_step + 1}: a batch without any target; raise --max_length")
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; lower --learning_rate or "
                "--max_grad_norm, or use --bf16 true instead of --fp16 true"
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, or remove what was written of it (full disk, Ctrl-C, SIGTERM)."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.process_index == 0 and self.run_settings is not None:
                # Before the library's own files, the last of which says that the checkpoint is whole.
                folder.mkdir(parents=True, exist_ok=True)
                write_json_atomic(folder / SETTINGS_FILE, self.run_settings)
            super()._save_checkpoint(*args, **kwargs)
        except BaseException:
            if self.args.process_index == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _refusal(flag: str) -> Iterator[None]:
    """Turn what the library says against the value of ``flag`` into one line.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{flag}: {' '.join(str(error).split())}") from error
