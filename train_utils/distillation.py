"""Distillation of the dense model into the pruned model: checks of the teacher, KL loss and Trainer.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
"""

from __future__ import annotations

from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import check_length
from slim_utils.common.loading import load_config, load_model, load_tokenizer
from train_utils.finetune_args import FinetuneArguments
from train_utils.finetune_dataset import IGNORED_LABEL
from train_utils.lora import cast_parameters, frozen_dtype
from train_utils.sparse_trainer import SlimTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import CausalLMOutput

# The fp32 logits of one chunk take 150 MB at a vocabulary of 150,000.
CHUNK_TOKENS = 256


def check_teacher(args: FinetuneArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check vocabulary and positions of the teacher (``--distill_from``) before its weights are loaded.

    Args:
        args: flags of the run.
        config: configuration of the student.
        tokenizer: tokenizer of the student, used for both models.

    Raises:
        UserError: if the teacher cannot be read, has another vocabulary, or too few positions for ``--max_length``.
    """
    path, trusted = args.model.distill_from, args.model.trust_remote_code
    assert path is not None
    try:
        teacher, vocabulary = load_config(path, trusted), load_tokenizer(path, trusted).get_vocab()
    except UserError as error:
        raise UserError(f"--distill_from: {error}") from error
    check_length(args.data.max_length, teacher, f"--distill_from {path}: --max_length")
    teacher_size, student_size = (model_config.get_text_config().vocab_size for model_config in (teacher, config))
    if teacher_size != student_size:
        raise UserError(f"--distill_from {path}: vocabulary size {teacher_size}, that of the student is {student_size}")
    if vocabulary != tokenizer.get_vocab():
        raise UserError(f"--distill_from {path}: the tokens of its tokenizer differ from those of the student")


def load_teacher(args: FinetuneArguments) -> PreTrainedModel:
    """The frozen model of ``--distill_from`` on the training device, in the dtype of frozen weights.

    Raises:
        UserError: if the teacher cannot be loaded.
    """
    assert args.model.distill_from is not None
    try:
        teacher = load_model(args.model.distill_from, "auto", args.model.trust_remote_code)
    except UserError as error:
        raise UserError(f"--distill_from: {error}") from error
    cast_parameters(teacher, frozen_dtype(args.training))
    return teacher.requires_grad_(False).to(args.training.device)


def target_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The rows (targets, vocabulary) of ``logits`` (batch, seqlen, vocabulary) that predict a target.

    Args:
        logits: logits of a causal language model; position ``t`` predicts token ``t + 1``.
        labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` for non-targets.
    """
    return logits[:, :-1][labels[:, 1:] != IGNORED_LABEL]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the softmaxes of logits, summed over tokens, in nats, computed in fp32.

    Equals the cross-entropy with soft targets of Hinton et al. (2015, section 2) at temperature 1, minus the entropy of
    the teacher. fp32 tensors exist for ``CHUNK_TOKENS`` tokens at a time, in the backward pass too.

    Args:
        student: logits (tokens, vocabulary); gradients flow to them.
        teacher: logits of the same shape.
    """
    # The forward is deterministic: no RNG state to restore.
    chunk_divergence = partial(checkpoint, _chunk_divergence, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(student.split(CHUNK_TOKENS), teacher.split(CHUNK_TOKENS), strict=True)
    return reduce(torch.add, (chunk_divergence(*chunk) for chunk in chunks))


def _chunk_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (functional.log_softmax(logits, -1, dtype=torch.float32) for logits in (student, teacher))
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


class DistillationTrainer(SlimTrainer):
    """Trainer with the KL divergence from a teacher as training loss; the evaluation loss is the cross-entropy.

    The teacher is not part of the model: it is not wrapped, trained or saved.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.teacher_logits: Tensor | None = None
        self.compute_loss_func = self.loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss; in training, runs the teacher first."""
        # The teacher's activations are freed before those of the student are allocated.
        self.teacher_logits = self.compute_teacher_logits(inputs) if model.training else None
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def compute_teacher_logits(self, inputs: dict[str, Any]) -> Tensor:
        """Logits (targets, vocabulary) of the teacher for a batch."""
        with self.accelerator.autocast():
            outputs = self.teacher(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )
        return target_logits(outputs.logits, inputs["labels"])

    def loss(self, outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean loss per target: the KL divergence in training, the cross-entropy in evaluation.

        Args:
            outputs: outputs of the student, with logits (batch, seqlen, vocabulary).
            labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` for non-targets.
            num_items_in_batch: divisor of the sum, the number of targets of a whole accumulated batch; ``None`` for the
                targets in ``labels``.
        """
        logits, labels = outputs.logits, labels.to(outputs.logits.device)
        if self.teacher_logits is None:
            return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)
        # Dropped within the step, so that the logits of two steps are never held at once.
        teacher_logits, self.teacher_logits = self.teacher_logits, None
        total = divergence(target_logits(logits, labels), teacher_logits)
        return total / (len(teacher_logits) if num_items_in_batch is None else num_items_in_batch)
