"""The dense model as the teacher of its pruned self: checks, the loss on their logits, and the Trainer with it.

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

# In fp32 a chunk's logits take 150 MB with a vocabulary of 150,000.
CHUNK_TOKENS = 256


def check_teacher(args: FinetuneArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure, before its weights are loaded, that the model of ``--distill_from`` can teach.

    Args:
        args: of the run.
        config: the student's.
        tokenizer: the student's, which makes the tokens of both.

    Raises:
        UserError: if it cannot be read, its logits are not of the student's tokens, or samples are too long for it.
    """
    path, trusted = args.model.distill_from, args.model.trust_remote_code
    assert path is not None
    try:
        teacher, vocabulary = load_config(path, trusted), load_tokenizer(path, trusted).get_vocab()
    except UserError as error:
        raise UserError(f"--distill_from: {error}") from error
    check_length(args.data.max_length, teacher, f"--distill_from {path}: --max_length")
    sizes = [of.get_text_config().vocab_size for of in (teacher, config)]
    if sizes[0] != sizes[1]:
        raise UserError(f"--distill_from {path}: a vocabulary of {sizes[0]}, the trained model's is {sizes[1]}")
    if vocabulary != tokenizer.get_vocab():
        raise UserError(f"--distill_from {path}: its tokenizer has other tokens than the trained model's")


def load_teacher(args: FinetuneArguments) -> PreTrainedModel:
    """The model of ``--distill_from``, frozen, in the precision of the student's frozen weights, on its device.

    Raises:
        UserError: if its weights cannot be loaded.
    """
    assert args.model.distill_from is not None
    try:
        teacher = load_model(args.model.distill_from, "auto", args.model.trust_remote_code)
    except UserError as error:
        raise UserError(f"--distill_from: {error}") from error
    cast_parameters(teacher, frozen_dtype(args.training))
    return teacher.requires_grad_(False).to(args.training.device)


def target_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits (targets, vocabulary) that predict a target, of ``logits`` (batch, seqlen, vocabulary).

    Args:
        logits: of a causal language model; those at position ``t`` predict token ``t + 1``.
        labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` where there is no target.
    """
    return logits[:, :-1][labels[:, 1:] != IGNORED_LABEL]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the softmaxes of logits, summed over tokens, in nats, computed in fp32.

    It is the cross-entropy with soft targets of Hinton et al. (2015, section 2) at temperature 1, less the teacher's
    entropy. Its fp32 tensors exist for ``CHUNK_TOKENS`` tokens at a time, in the backward pass too.

    Args:
        student: logits (tokens, vocabulary), which get a gradient.
        teacher: logits of the same shape.
    """
    # Nothing is drawn at random that a second forward would have to repeat.
    chunk_divergence = partial(checkpoint, _chunk_divergence, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(student.split(CHUNK_TOKENS), teacher.split(CHUNK_TOKENS), strict=True)
    return reduce(torch.add, (chunk_divergence(*chunk) for chunk in chunks))


def _chunk_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = (functional.log_softmax(logits, -1, dtype=torch.float32) for logits in (student, teacher))
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True)


class DistillationTrainer(SlimTrainer):
    """A Trainer whose student imitates a teacher on the target tokens; evaluation keeps to the cross-entropy.

    The teacher is no part of the model: it is not wrapped, trained or saved.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.teacher_logits: Tensor | None = None
        self.compute_loss_func = self.loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Ask the teacher, where training goes on, and leave the rest to the library."""
        # First the teacher: its activations are gone when the student's come.
        self.teacher_logits = self.teach(inputs) if model.training else None
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def teach(self, inputs: dict[str, Any]) -> Tensor:
        """The teacher's logits (targets, vocabulary) of a batch."""
        with self.accelerator.autocast():
            outputs = self.teacher(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )
        return target_logits(outputs.logits, inputs["labels"])

    def loss(self, outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Of training the divergence, of evaluation, by which runs compare, the cross-entropy; mean per target.

        Args:
            outputs: the student's, with logits (batch, seqlen, vocabulary).
            labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` where there is no target.
            num_items_in_batch: to divide the sum by, the targets of a whole accumulated batch; ``None`` for those of
                ``labels``.
        """
        logits, labels = outputs.logits, labels.to(outputs.logits.device)
        if self.teacher_logits is None:
            return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)
        # Not kept beyond the step: the next one's would come on top.
        teacher_logits, self.teacher_logits = self.teacher_logits, None
        total = divergence(target_logits(logits, labels), teacher_logits)
        return total / (len(teacher_logits) if num_items_in_batch is None else num_items_in_batch)
