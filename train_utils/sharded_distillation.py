"""Distillation on sharded weights: the logits of both models are whole.

A head that ran chunk by chunk (:mod:`train_utils.distillation`) would be gathered once for each chunk, whose number
differs between the processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from train_utils.distillation import CHUNK_TOKENS, cross_entropy, target_rows
from train_utils.sparse_trainer import SlimTrainer

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutput


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) of rows (targets, vocabulary) of logits, summed over targets, in nats, computed in fp32."""
    target = functional.log_softmax(teacher_logits, -1, dtype=torch.float32)
    predicted = functional.log_softmax(logits, -1, dtype=torch.float32)
    return functional.kl_div(predicted, target, reduction="sum", log_target=True)


class ShardedDistillationTrainer(SlimTrainer):
    """Trainer with the KL divergence from a teacher as training loss; the evaluation loss is the cross-entropy.

    Args:
        teacher: sharded and frozen model to distill from.
    """

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self._teacher_logits: Tensor | None = None
        self.compute_loss_func = self.loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss; in training, runs the teacher first."""
        # Not the argument, which may be a DeepSpeed engine: those are always in training mode.
        self._teacher_logits = self._run_teacher(inputs) if self.model.training else None
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _run_teacher(self, inputs: dict[str, Any]) -> Tensor:
        """Logits (targets, vocabulary) of the teacher for a batch."""
        with self.accelerator.autocast():
            outputs = self.teacher(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )
        return target_rows(outputs.logits, inputs["labels"])

    def loss(self, outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean loss per target: the KL divergence in training, the cross-entropy in evaluation.

        Args:
            outputs: outputs of the student, with logits (batch, seqlen, vocabulary).
            labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` for non-targets.
            num_items_in_batch: divisor of the sum, the number of targets of a whole accumulated batch; ``None`` for the
                targets in ``labels``.
        """
        if self._teacher_logits is None:
            return cross_entropy(outputs, labels, num_items_in_batch)
        teacher_logits, self._teacher_logits = self._teacher_logits, None
        logits = target_rows(outputs.logits, labels)
        # The fp32 probabilities of a chunk are computed again in the backward pass instead of being kept.
        chunks = zip(logits.split(CHUNK_TOKENS), teacher_logits.split(CHUNK_TOKENS), strict=True)
        total = sum(checkpoint(divergence, *chunk, use_reentrant=False) for chunk in chunks)
        return total / (len(logits) if num_items_in_batch is None else num_items_in_batch)
