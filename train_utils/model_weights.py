"""How a run opens, trains, saves and evaluates its models.

:class:`WholeWeights` holds them in every process, :mod:`train_utils.sharding` splits them among the processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_eval.ppl_dataset import EvalSets
from ppl_eval.ppl_eval import evaluate
from slim_utils.common.loading import load_model
from train_utils.distillation import load_teacher
from train_utils.finetune_args import FinetuneArguments
from train_utils.finetune_dataset import FinetuneData
from train_utils.finetune_result import ModelMasks, save_result, warn_if_not_masked
from train_utils.trainable import prepare_model
from train_utils.trainer_setup import open_teacher

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase


class ModelWeights(ABC):
    """Opens, loads, saves and evaluates the models of one run, in the order of the methods.

    Args:
        args: flags of the run.
    """

    def __init__(self, args: FinetuneArguments) -> None:
        self.args = args

    @abstractmethod
    def open_base(self) -> Any:
        """Open the model to train.

        Raises:
            UserError: if it cannot be loaded.
        """

    @abstractmethod
    def open_teacher(self) -> Any:
        """Open the model of ``--distill_from``.

        Raises:
            UserError: if it cannot be loaded.
        """

    @abstractmethod
    def evaluate_base(self, base: Any, windows: EvalSets) -> list[dict[str, Any]]:
        """Return the perplexities of an opened model; on rank 0."""

    @abstractmethod
    def load(self, base: Any) -> PreTrainedModel | PeftModel:
        """Return the model to train, set up by :func:`prepare_model`, of the opened ``base``."""

    @abstractmethod
    def load_teacher(
        self, teacher: Any, data: FinetuneData, collator: DataCollatorForSeq2Seq, settings: dict[str, Any]
    ) -> Any:
        """Return what the Trainer learns from, of the opened ``teacher``; arguments as of :func:`open_teacher`."""

    @abstractmethod
    def gather(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Bring the trained ``model`` together for :meth:`write`; in all processes, before they part."""

    @abstractmethod
    def write(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> PreTrainedModel:
        """Write the result to ``folder``; return the model that a user would load, possibly without weights."""

    @abstractmethod
    def evaluate_result(self, result: PreTrainedModel, folder: Path, windows: EvalSets) -> list[dict[str, Any]]:
        """Return the perplexities of the ``result`` of :meth:`write`, which is now in ``folder``."""


class WholeWeights(ModelWeights):
    """Every process holds whole models.

    Args:
        args: flags of the run.
        masks: masks of the model, if it is trained with masks.
    """

    def __init__(self, args: FinetuneArguments, masks: ModelMasks | None) -> None:
        super().__init__(args)
        self._masks = masks

    def open_base(self) -> PreTrainedModel:
        """Load the model to train; warn if it is trained with masks and its removed weights are not zero."""
        path = self.args.model.model_name_or_path
        model = load_model(path, "auto", self.args.model.trust_remote_code)
        self._dtype = model.dtype
        if self._masks:
            warn_if_not_masked(model, self._masks, path)
        return model

    def open_teacher(self) -> PreTrainedModel:
        """Load the model of ``--distill_from``."""
        return load_teacher(self.args)

    def evaluate_base(self, base: PreTrainedModel, windows: EvalSets) -> list[dict[str, Any]]:
        """Return the perplexities of ``base``, which moves to the training device."""
        return evaluate(base.to(self.args.training.device), windows)

    def load(self, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Return ``base`` set up for training."""
        return prepare_model(base, self.args)

    def load_teacher(
        self,
        teacher: PreTrainedModel,
        data: FinetuneData,
        collator: DataCollatorForSeq2Seq,
        settings: dict[str, Any],
    ) -> Any:
        """Return :func:`open_teacher`."""
        return open_teacher(self.args, teacher, data, collator, settings)

    def gather(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Do nothing: the main process has the whole model."""

    def write(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> PreTrainedModel:
        """Return :func:`save_result`."""
        return save_result(self.args, model, tokenizer, self._dtype, self._masks, folder)

    def evaluate_result(self, result: PreTrainedModel, folder: Path, windows: EvalSets) -> list[dict[str, Any]]:
        """Return the perplexities of ``result``, on the training device."""
        return evaluate(result.to(self.args.training.device), windows)
