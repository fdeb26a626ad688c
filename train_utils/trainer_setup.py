"""Build the Trainer of a run: evaluation sets, best-model metric, loss and data."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from ppl_eval.ppl_dataset import EvalSets
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import set_padding_token
from train_utils.distillation import DistillationTrainer, LiveTeacher, Teacher
from train_utils.finetune_args import FinetuneArguments
from train_utils.finetune_dataset import FinetuneData, window_dataset
from train_utils.held_out import HeldOutStopping
from train_utils.sharded_distillation import ShardedDistillationTrainer
from train_utils.sharding_checks import shards_weights
from train_utils.sparse_trainer import SlimTrainer
from train_utils.teacher_cache import CachedTeacher, cache_predictions, samples_hash, wait_for_folder

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VALIDATION = "validation"


def evaluation_sets(args: FinetuneArguments, data: FinetuneData, windows: EvalSets) -> dict[str, datasets.Dataset]:
    """Evaluation sets during training, by name: the held-out rows first, then the texts in ``windows``.

    Without ``--eval_strategy``, only held-out stopping evaluates, and no text.
    """
    sets = {VALIDATION: data.validation} if data.validation is not None else {}
    if not args.training.do_eval:
        return sets
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


def padding_collator(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> DataCollatorForSeq2Seq:
    """Collator that pads samples on the right; the tokenizer is not changed."""
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    set_padding_token(padding, config)
    return DataCollatorForSeq2Seq(padding, padding=True)


def open_teacher(
    args: FinetuneArguments,
    model: PreTrainedModel,
    data: FinetuneData,
    collator: DataCollatorForSeq2Seq,
    settings: dict[str, Any],
) -> Teacher:
    """The teacher of a run: ``model``, or with ``--cache_teacher`` its stored predictions.

    Args:
        args: flags of the run.
        model: model of ``--distill_from``; moved to the training device where it runs.
        data: training samples.
        collator: result of :func:`padding_collator`.
        settings: result of :func:`~train_utils.resumption.run_settings`.

    Raises:
        UserError: if the cache cannot be written.
    """
    training, count = args.training, args.model.cache_teacher
    if not count:
        return LiveTeacher(model.to(training.device))

    samples = data.train.select_columns(["input_ids", "attention_mask", "labels"])

    def batches() -> Iterator[dict[str, Tensor]]:
        for batch in DataLoader(samples, training.per_device_train_batch_size, collate_fn=collator):
            yield {name: values.to(training.device) for name, values in batch.items()}

    content = [settings["teacher"], samples_hash(samples), count, str(model.dtype)]
    folder = args.cache_dir / f"teacher-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}"
    if training.local_process_index == 0:
        cache_predictions(folder, lambda: LiveTeacher(model.to(training.device)).top, batches, len(samples), count)
    else:
        # Not in a collective, which would end after --ddp_timeout.
        wait_for_folder(folder)
    return CachedTeacher(folder, count)


def build_trainer(
    args: FinetuneArguments,
    model: PreTrainedModel | PeftModel,
    collator: DataCollatorForSeq2Seq,
    data: FinetuneData,
    eval_sets: dict[str, datasets.Dataset],
    teacher: Any,
    settings: dict[str, Any],
) -> SlimTrainer:
    """The Trainer of a run: a :class:`DistillationTrainer` if there is a teacher, else a :class:`SlimTrainer`.

    Args:
        args: flags of the run.
        model: the model to train.
        collator: result of :func:`padding_collator`.
        data: training and validation samples.
        eval_sets: result of :func:`evaluation_sets`.
        teacher: a :class:`Teacher`, or a sharded model; ``None`` to train without one.
        settings: result of :func:`~train_utils.resumption.run_settings`, stored in every checkpoint.

    Raises:
        UserError: if incomplete batches are dropped and there are no others.
    """
    training = copy.copy(args.training)
    batch = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and len(data.train) < batch:
        raise UserError(f"--dataloader_drop_last true: {len(data.train)} samples are fewer than the {batch} of a batch")
    training.output_dir = str(args.run_folder)
    callbacks = []
    if args.stops_on_held_out:
        training.eval_on_start = True
        callbacks.append(HeldOutStopping(model, f"eval_{VALIDATION}_loss", sum(map(len, eval_sets.values()))))
    options = {
        "model": model,
        "args": training,
        "data_collator": collator,
        "train_dataset": data.train,
        "eval_dataset": eval_sets if training.do_eval or args.stops_on_held_out else None,
        "callbacks": callbacks,
        "run_settings": settings,
    }
    if teacher is None:
        return SlimTrainer(focal_gamma=args.model.focal_loss_gamma if args.model.use_focal_loss else None, **options)
    if shards_weights(training):
        return ShardedDistillationTrainer(teacher=teacher, **options)
    return DistillationTrainer(teacher=teacher, **options)


def held_out_record(trainer: SlimTrainer) -> dict[str, Any]:
    """Entry of ``run.json`` with the held-out losses by step and the step whose weights were kept, if there are any."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, HeldOutStopping) and callback.losses:
            return {"held_out": {"kept_step": callback.best_step, "losses": callback.losses}}
    return {}
