"""The Trainer of a run: its evaluation sets, its metric, its loss and its data."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForSeq2Seq

from ppl_eval.ppl_dataset import EvalSets
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import use_padding
from train_utils.distillation import DistillationTrainer
from train_utils.finetune_args import FinetuneArguments
from train_utils.finetune_dataset import FinetuneData, window_dataset
from train_utils.sparse_trainer import SlimTrainer

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALIDATION = "validation"


def evaluation_sets(data: FinetuneData, watched: EvalSets) -> dict[str, datasets.Dataset]:
    """What is evaluated while training, by name: the held-out rows first, then the watched texts."""
    sets = {VALIDATION: data.validation} if data.validation is not None else {}
    return sets | {key.name: window_dataset(windows) for key, windows in watched.items()}


def best_metric(asked: str | None, names: list[str]) -> str | None:
    """The metric that ``--metric_for_best_model`` means, where every evaluation set has a loss of its own.

    Args:
        asked: the flag, or what the Trainer takes where it needs one: ``loss`` is that of the first set.
        names: of the evaluation sets.

    Raises:
        UserError: if no set has such a metric.
    """
    if asked is None:
        return None
    if not names:
        raise UserError(
            f"no data to measure {asked} on, by which the best model or the learning rate is chosen; raise "
            "--val_dataset_size, or give a text by --extra_val_set"
        )
    metrics = [f"eval_{name}_loss" for name in names]
    metric = f"eval_{asked.removeprefix('eval_')}"
    if metric == "eval_loss":
        return metrics[0]
    if metric not in metrics:
        raise UserError(f"--metric_for_best_model {asked}: choose one of eval_loss, {', '.join(metrics)}")
    return metric


def build_trainer(
    args: FinetuneArguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: FinetuneData,
    eval_sets: dict[str, datasets.Dataset],
    teacher: PreTrainedModel | None,
    settings: dict[str, Any],
) -> SlimTrainer:
    """The Trainer with its data, and with its teacher where there is one.

    Args:
        args: of the run.
        model: to train.
        tokenizer: the model's.
        data: to train on.
        eval_sets: of :func:`evaluation_sets`.
        teacher: to imitate.
        settings: of :func:`~train_utils.resumption.run_settings`, kept in every checkpoint.
    """
    # For the batches alone; the saved tokenizer stays as it is.
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    use_padding(padding, model.config)
    training = copy.copy(args.training)
    training.output_dir = str(args.run_folder)
    options = {
        "model": model,
        "args": training,
        "data_collator": DataCollatorForSeq2Seq(padding, padding=True),
        "train_dataset": data.train,
        "eval_dataset": eval_sets if training.do_eval else None,
        "run_settings": settings,
    }
    if teacher is None:
        return SlimTrainer(focal_gamma=args.model.focal_loss_gamma if args.model.use_focal_loss else None, **options)
    return DistillationTrainer(teacher=teacher, **options)
