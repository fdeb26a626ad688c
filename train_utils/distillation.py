"""Distillation of the dense model into the pruned model: checks of the teacher, KL loss and Trainer.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast

from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import check_length
from slim_utils.common.loading import load_config, load_model, load_tokenizer
from slim_utils.common.model_source import check_input
from train_utils.finetune_args import FinetuneArguments
from train_utils.finetune_dataset import IGNORED_LABEL
from train_utils.sharding_checks import shards_weights
from train_utils.sparse_trainer import SlimTrainer
from train_utils.teacher_cache import Divergence, top_log_probabilities
from train_utils.trainable import cast_parameters, frozen_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import CausalLMOutput, ModelOutput

logger = logging.getLogger(__name__)

# The fp32 logits of one chunk take 150 MB at a vocabulary of 150,000. Heads run once for each chunk.
CHUNK_TOKENS = 256


def check_teacher(args: FinetuneArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check vocabulary and positions of the teacher (``--distill_from``) before its weights are loaded.

    Logs a warning if it is the student.

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
        check_input(path, shards_weights(args.training))
    except UserError as error:
        raise UserError(f"--distill_from: {error}") from error
    check_length(args.data.max_length, teacher, f"--distill_from {path}: --max_length")
    teacher_size, student_size = (model_config.get_text_config().vocab_size for model_config in (teacher, config))
    if teacher_size != student_size:
        raise UserError(f"--distill_from {path}: vocabulary size {teacher_size}, that of the student is {student_size}")
    if args.model.cache_teacher >= teacher_size:
        raise UserError(f"--cache_teacher {args.model.cache_teacher}: below the vocabulary size, {teacher_size}")
    if vocabulary != tokenizer.get_vocab():
        raise UserError(f"--distill_from {path}: the tokens of its tokenizer differ from those of the student")
    if Path(path).resolve() == Path(args.model.model_name_or_path).resolve() and not args.training.check_only:
        logger.warning("--distill_from %s: the model to train, which has nothing to learn from itself", path)


def load_teacher(args: FinetuneArguments) -> PreTrainedModel:
    """The frozen model of ``--distill_from`` on the CPU, in the dtype of frozen weights.

    Raises:
        UserError: if the teacher cannot be loaded.
    """
    assert args.model.distill_from is not None
    try:
        teacher = load_model(args.model.distill_from, "auto", args.model.trust_remote_code)
    except UserError as error:
        raise UserError(f"--distill_from: {error}") from error
    cast_parameters(teacher, frozen_dtype(args.training))
    return teacher.requires_grad_(False)


def target_rows(states: Tensor, labels: Tensor) -> Tensor:
    """The rows (targets, n) of ``states`` (batch, seqlen, n) at the positions that predict a target.

    Args:
        states: states of a causal language model; position ``t`` predicts token ``t + 1``.
        labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` for non-targets.
    """
    return states[:, :-1][labels[:, 1:] != IGNORED_LABEL]


def cross_entropy(outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Mean cross-entropy per target; arguments as of :meth:`DistillationTrainer.loss`."""
    logits = outputs.logits
    return ForCausalLMLoss(logits, labels.to(logits.device), logits.shape[-1], num_items_in_batch)


class Head:
    """The map from final hidden states to logits of a causal language model, with its scaling and soft-capping.

    It runs the model's own forward with the decoder's output given, so that nothing of it is written again, and in the
    precision in which the decoder ran: on a GPU, a LayerNorm returns fp32 in mixed precision.

    Args:
        model: a causal language model, with or without adapters.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self._model = model.get_base_model() if isinstance(model, PeftModel) else model
        decoder = self._model.get_decoder()
        # Llama 4 has its decoder under another name than transformers looks for, and is then given itself.
        self.decoder: nn.Module = self._model.model if decoder is self._model else decoder
        self._output_class: type[ModelOutput] = BaseModelOutputWithPast
        self.hidden: Tensor | None = None
        self._autocast: dict[str, Any] = {"device_type": "cpu", "enabled": False}
        self.decoder.register_forward_pre_hook(_keep_all_positions, with_kwargs=True)
        self.decoder.register_forward_hook(self._capture)

    def _capture(self, decoder: nn.Module, inputs: Any, output: ModelOutput) -> None:
        self._output_class, self.hidden = type(output), output.last_hidden_state
        device = self.hidden.device.type
        self._autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }

    def take_hidden(self) -> Tensor:
        """Return the hidden states (batch, seqlen, hidden) of the last forward, once."""
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        return hidden

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the head."""
        return [parameter for parameter in self._model.get_output_embeddings().parameters() if parameter.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (tokens, vocabulary) of ``hidden`` (tokens, hidden)."""
        output = self._output_class(last_hidden_state=hidden[None])
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with torch.autocast(**self._autocast), _output_given(self.decoder, output):
            logits = self._model(input_ids=tokens, use_cache=False).logits[0]
        self.hidden = None
        return logits


def _keep_all_positions(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Leave ``logits_to_keep`` to the head; Gemma 4 drops the other positions within the decoder."""
    return args, {name: value for name, value in kwargs.items() if name != "logits_to_keep"}


@contextmanager
def _output_given(module: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Let ``module`` return ``output`` instead of running."""
    forward = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if forward is not None:
            module.forward = forward


class ChunkedDivergence(torch.autograd.Function):
    """KL(teacher ‖ student) of the predictions from hidden states, summed over tokens, in nats, computed in fp32.

    Equals the cross-entropy with soft targets of Hinton et al. (2015, section 2) at temperature 1, minus the entropy of
    the teacher. Logits exist for ``CHUNK_TOKENS`` tokens at a time, and once: the gradient of a chunk is computed with
    its loss (as in Liger's fused linear losses).
    """

    @staticmethod
    def forward(ctx: Any, student: Head, divergence: Divergence, hidden: Tensor, *parameters: Tensor) -> Tensor:
        """The divergence.

        Args:
            ctx: context of autograd.
            student: head of the student.
            divergence: divergence from the teacher of the predictions of a chunk.
            hidden: (tokens, hidden) states of the student; gradients flow to them.
            parameters: trained parameters of the student's head; gradients flow to them.
        """
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = [torch.empty_like(hidden), *map(torch.zeros_like, parameters)]
        for start in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            with torch.enable_grad():
                leaf = hidden[chunk].detach().requires_grad_()
                loss = divergence(functional.log_softmax(student(leaf), -1, dtype=torch.float32), chunk)
                hidden_gradient, *others = torch.autograd.grad(loss, [leaf, *parameters])
            total += loss.detach()
            gradients[0][chunk] = hidden_gradient
            for gradient, other in zip(gradients[1:], others, strict=True):
                gradient += other
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of :meth:`forward`."""
        hidden, *parameters = (gradient * outputs[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
        return None, None, hidden, *parameters


class Teacher(Protocol):
    """What the student learns from."""

    def targets(self, inputs: dict[str, Tensor]) -> Divergence:
        """Return the divergence from the teacher of the predictions of a batch."""


class LiveTeacher:
    """Teacher that runs for every batch; its head runs chunk by chunk.

    Args:
        model: frozen model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._head = Head(model)

    @torch.no_grad()
    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states (targets, hidden) for a batch."""
        self._head.decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return target_rows(self._head.take_hidden(), inputs["labels"])

    @torch.no_grad()
    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return functional.log_softmax(self._head(hidden), -1, dtype=torch.float32)

    def targets(self, inputs: dict[str, Tensor]) -> Divergence:
        """Return the divergence from the teacher of the predictions of a batch."""
        hidden = self._states(inputs)

        def divergence(predicted: Tensor, chunk: slice) -> Tensor:
            target = self._log_probabilities(hidden[chunk])
            return functional.kl_div(predicted, target, reduction="sum", log_target=True)

        return divergence

    def top(self, inputs: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Return :func:`top_log_probabilities` of all targets of a batch."""
        parts = [
            top_log_probabilities(self._log_probabilities(chunk), count)
            for chunk in self._states(inputs).split(CHUNK_TOKENS)
        ]
        tokens, log_probabilities = map(torch.cat, zip(*parts, strict=True))
        return tokens, log_probabilities


class DistillationTrainer(SlimTrainer):
    """Trainer with the KL divergence from a teacher as training loss; the evaluation loss is the cross-entropy.

    The teacher is not part of the model: it is not wrapped, trained or saved.
    """

    def __init__(self, *args: Any, teacher: Teacher, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self._student_head = Head(self.accelerator.unwrap_model(self.model))
        self._divergence: Divergence | None = None
        self.compute_loss_func = self.loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss; in training, runs the teacher first, and no head."""
        self._divergence = None
        # Not the argument, which may be a DeepSpeed engine: those are always in training mode.
        if self.model.training:
            # The teacher's activations are freed before those of the student are allocated.
            with self.accelerator.autocast():
                self._divergence = self.teacher.targets(inputs)
            # The logits of one position: the heads run on the hidden states, chunk by chunk.
            inputs = {**inputs, "logits_to_keep": 1}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def loss(self, outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean loss per target: the KL divergence in training, the cross-entropy in evaluation.

        Args:
            outputs: outputs of the student; in evaluation with logits (batch, seqlen, vocabulary).
            labels: (batch, seqlen) token ids, ``IGNORED_LABEL`` for non-targets.
            num_items_in_batch: divisor of the sum, the number of targets of a whole accumulated batch; ``None`` for the
                targets in ``labels``.
        """
        if self._divergence is None:
            return cross_entropy(outputs, labels, num_items_in_batch)
        # Dropped within the step, so that the states of two steps are never held at once.
        divergence, self._divergence = self._divergence, None
        student = self._student_head
        hidden = target_rows(student.take_hidden(), labels)
        total = ChunkedDivergence.apply(student, divergence, hidden, *student.parameters())
        return total / (len(hidden) if num_items_in_batch is None else num_items_in_batch)
