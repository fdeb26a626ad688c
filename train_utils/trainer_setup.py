"""Build the Trainer of a run: evaluation sets, best-model metric, loss and data."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForSeq2Seq

from ppl_eval.ppl_dataset import EvalSets
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import set_padding_token
from train_utils.distillation import DistillationTrainer
from train_utils.finetune_args import FinetuneArguments
from train_utils.finetune_dataset import FinetuneData, window_dataset
from train_utils.held_out import HeldOutStopping
from train_utils.sparse_trainer import SlimTrainer

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALIDATION = "validation"


def evaluation_sets(data: FinetuneData, windows: EvalSets) -> dict[str, datasets.Dataset]:
    """Evaluation sets during training, by name: the held-out rows first, then the texts in ``windows``."""
    sets = {VALIDATION: data.validation} if data.validation is not None else {}
    return sets | {key.name: window_dataset(tokens) for key, tokens in windows.items()}


def best_metric(metric_name: str | None, set_names: list[str]) -> str | None:
    """Full name of the metric ``--metric_for_best_model metric_name``; every evaluation set has its own loss.

    Args:
        metric_name: the flag, or the Trainer's default for it; ``loss`` means the loss of the first set.
        set_names: names of the evaluation sets.

    Raises:
        UserError: if no evaluation set has this metric.
    """
    if metric_name is None:
        return None
    if not set_names:
        raise UserError(
            f"no data to measure {metric_name}, which selects the best model or the learning rate; raise "
            "--val_dataset_size or pass a text with --extra_val_set"
        )
    metrics = [f"eval_{name}_loss" for name in set_names]
    metric = f"eval_{metric_name.removeprefix('eval_')}"
    if metric == "eval_loss":
        return metrics[0]
    if metric not in metrics:
        raise UserError(f"--metric_for_best_model {metric_name}: choose one of eval_loss, {', '.join(metrics)}")
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
    """The Trainer of a run: a :class:`DistillationTrainer` if there is a teacher, else a :class:`SlimTrainer`.

    With held-out stopping alone, the texts in ``eval_sets`` are not evaluated during training.

    Args:
        args: flags of the run.
        model: the model to train.
        tokenizer: tokenizer of the model.
        data: training and validation samples.
        eval_sets: result of :func:`evaluation_sets`.
        teacher: model to distill from.
        settings: result of :func:`~train_utils.resumption.run_settings`, stored in every checkpoint.
    """
    # A copy for collation; the saved tokenizer is not changed.
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    set_padding_token(padding, model.config)
    training = copy.copy(args.training)
    training.output_dir = str(args.run_folder)
    callbacks = []
    if args.stops_on_held_out:
        if not training.do_eval:
            eval_sets = {VALIDATION: eval_sets[VALIDATION]}
        training.eval_on_start = True
        callbacks.append(HeldOutStopping(model, f"eval_{VALIDATION}_loss", len(eval_sets[VALIDATION])))
    options = {
        "model": model,
        "args": training,
        "data_collator": DataCollatorForSeq2Seq(padding, padding=True),
        "train_dataset": data.train,
        "eval_dataset": eval_sets if training.do_eval or args.stops_on_held_out else None,
        "callbacks": callbacks,
        "run_settings": settings,
    }
    if teacher is None:
        return SlimTrainer(focal_gamma=args.model.focal_loss_gamma if args.model.use_focal_loss else None, **options)
    return DistillationTrainer(teacher=teacher, **options)
