"""Held-out stopping: a run ends with the weights of its lowest loss on held-out samples."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from slim_utils.common.atomic_output import write_json_atomic

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

MAX_EVALUATIONS = 10
# Share of the time of training that evaluations take; a forward costs a quarter of a step with a teacher.
MAX_EVALUATION_SHARE, STEPS_PER_FORWARD = 0.05, 0.25
# Rises in a row that end the run. At the start of a schedule, the loss may rise for a while.
PATIENCE = 3
# In checkpoints: the losses so far by step and, if their lowest is that of an earlier step, its weights.
LOSSES_FILE, BEST_FILE = "held_out_losses.json", "held_out_best.safetensors"


def evaluation_steps(max_steps: int, samples_per_step: int, num_evaluated: int) -> set[int]:
    """Steps after which the held-out samples are evaluated, evenly spaced; the last step is one of them.

    There are up to ``MAX_EVALUATIONS``, fewer where they would take more than ``MAX_EVALUATION_SHARE`` of the training.
    """
    affordable = MAX_EVALUATION_SHARE * max_steps * samples_per_step / (STEPS_PER_FORWARD * num_evaluated)
    count = max(1, min(MAX_EVALUATIONS, int(affordable), max_steps))
    return {math.ceil(index * max_steps / count) for index in range(1, count + 1)}


class HeldOutStopping(TrainerCallback):
    """End training where the loss on the held-out samples has risen ``PATIENCE`` times in a row.

    Training ends with the weights of the lowest loss, those before the first step included. Every process keeps them in
    host memory; checkpoints hold them, so that a resumed run ends with the same weights.

    Args:
        model: the model that is trained.
        metric: name of the held-out loss in the metrics of an evaluation.
        num_evaluated: number of samples of an evaluation.
    """

    def __init__(self, model: nn.Module, metric: str, num_evaluated: int) -> None:
        self.metric, self.num_evaluated = metric, num_evaluated
        self.losses: dict[int, float] = {}
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._best: dict[str, Tensor] = {}
        self._steps: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the steps of the evaluations; a resumed run reads the losses and weights in its checkpoint."""
        samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._steps = evaluation_steps(state.max_steps, samples, self.num_evaluated)
        # A run with --auto_find_batch_size may start over.
        self.losses.clear()
        if state.global_step and isinstance(args.resume_from_checkpoint, str):
            self._read(Path(args.resume_from_checkpoint), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request an evaluation."""
        control.should_evaluate |= state.global_step in self._steps

    @torch.no_grad()
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Keep the weights of the lowest loss, and end the run if it rises."""
        if self.metric not in metrics:
            return
        self.losses[state.global_step] = metrics[self.metric]
        if state.global_step == self.best_step:
            self._keep()
        control.should_training_stop |= rises_in_a_row(list(self.losses.values())) >= PATIENCE

    @property
    def best_step(self) -> int:
        """The step with the lowest held-out loss; of equal ones the first."""
        return min(self.losses, key=self.losses.__getitem__)

    @torch.no_grad()
    def _keep(self) -> None:
        """Copy the weights of the present step."""
        if not self._best:
            self._best = {name: torch.empty_like(weight, device="cpu") for name, weight in self._trained.items()}
        for name, weight in self._trained.items():
            self._best[name].copy_(weight)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the losses and the weights of the lowest one to the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.process_index or not self.losses or not folder.is_dir():
            return
        if self.best_step != state.global_step:
            save_file(self._best, folder / BEST_FILE)
        write_json_atomic(folder / LOSSES_FILE, {str(step): loss for step, loss in self.losses.items()})

    def _read(self, checkpoint: Path, step: int) -> None:
        """Read what :meth:`on_save` wrote to the checkpoint of ``step``, whose weights the model has."""
        path = checkpoint / LOSSES_FILE
        if not path.is_file():
            logger.warning("%s: no %s; only held-out losses from step %d on count", checkpoint, path.name, step)
            return
        self.losses.update({int(key): loss for key, loss in json.loads(path.read_text(encoding="utf-8")).items()})
        if self.best_step == step:
            self._keep()
        else:
            self._best = load_file(checkpoint / BEST_FILE)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the weights of the lowest loss."""
        if not self.losses or self.best_step == state.global_step:
            return
        for name, weight in self._trained.items():
            weight.copy_(self._best[name])
        best, last = self.losses[self.best_step], list(self.losses.values())[-1]
        if args.process_index == 0:
            logger.warning(
                "step %d is kept: its held-out loss is %.4f, the last one %.4f; %s",
                self.best_step,
                best,
                last,
                "train for fewer epochs or on more data" if self.best_step else "lower --learning_rate",
            )


def rises_in_a_row(losses: list[float]) -> int:
    """How many of the last of ``losses`` are above the one before them."""
    count = 0
    for before, after in zip(losses[-2::-1], losses[:0:-1], strict=True):
        if after <= before:
            break
        count += 1
    return count
