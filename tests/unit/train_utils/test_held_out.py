"""Held-out stopping: when held-out samples are evaluated, when a run ends, and which weights it ends with."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from train_utils.held_out import HeldOutStopping, evaluation_steps, rises_in_a_row

METRIC = "eval_validation_loss"


@pytest.mark.parametrize(
    ("max_steps", "samples", "held_out", "expected"),
    [
        # 5 % of the time of 195 steps of 2 samples are 78 forwards.
        (195, 2, 32, {98, 195}),
        (195, 2, 78, {195}),
        (195, 2, 1000, {195}),
        (1950, 2, 32, {195 * index for index in range(1, 11)}),
        (3, 1000, 1, {1, 2, 3}),
        (1, 1, 1, {1}),
    ],
)
def test_evaluation_steps_are_affordable_and_include_the_last(max_steps, samples, held_out, expected):
    assert evaluation_steps(max_steps, samples, held_out) == expected


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([2.0], 0), ([2.0, 1.0], 0), ([2.0, 2.0], 0), ([1.0, 2.0, 1.0, 2.0, 3.0], 2), ([1.0, 2.0, 3.0], 2)],
)
def test_rises_in_a_row(losses, expected):
    assert rises_in_a_row(losses) == expected


def arguments(**changes) -> SimpleNamespace:
    """Arguments of a run with one sample a step."""
    values = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "world_size": 1, "process_index": 0}
    return SimpleNamespace(**values | {"resume_from_checkpoint": None} | changes)


def train(losses: list[float]) -> tuple[float, int, HeldOutStopping]:
    """Weight at the end and number of steps of a run whose weight is its step and whose losses are given."""
    model, frozen = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
    model.weight.data.fill_(0.0)
    model.frozen = frozen.requires_grad_(False)
    args, control = arguments(), TrainerControl()
    state = TrainerState(max_steps=len(losses) - 1)
    stopping = HeldOutStopping(model, METRIC, num_evaluated=1)
    stopping._steps = set(range(len(losses)))
    stopping.on_evaluate(args, state, control, {METRIC: losses[0]})
    for step, loss in enumerate(losses[1:], 1):
        state.global_step = step
        with torch.no_grad():
            model.weight.fill_(step)
        control.should_evaluate = False
        stopping.on_step_end(args, state, control)
        assert control.should_evaluate
        stopping.on_evaluate(args, state, control, {"eval_wikitext2_loss": -1.0})
        stopping.on_evaluate(args, state, control, {METRIC: loss})
        if control.should_training_stop:
            break
    stopping.on_train_end(args, state, control)
    return model.weight.item(), state.global_step, stopping


@pytest.mark.parametrize(
    ("losses", "weight", "steps"),
    [
        ([3.0, 2.0, 1.0], 2, 2),
        ([3.0, 1.0, 2.0], 1, 2),
        # Worse than without training.
        ([1.0, 3.0, 2.0], 0, 2),
        # Rises for a while at the start of the schedule.
        ([2.0, 2.5, 2.6, 2.2, 1.0, 0.5], 5, 5),
        ([3.0, 1.0, 2.0, 3.0, 4.0, 0.5], 1, 4),
    ],
)
def test_run_ends_with_the_weights_of_the_lowest_loss(losses, weight, steps):
    assert train(losses)[:2] == (weight, steps)


def test_only_trained_weights_are_kept():
    assert list(train([3.0, 1.0, 2.0])[2]._best) == ["weight"]


@pytest.mark.parametrize(
    ("losses", "advice"), [([3.0, 1.0, 2.0], "train for fewer epochs"), ([1.0, 3.0, 2.0], "lower --learning_rate")]
)
def test_a_run_that_goes_back_says_so(caplog, losses, advice):
    train(losses)
    assert advice in caplog.text


def test_a_run_that_ends_at_its_lowest_loss_says_nothing(caplog):
    train([3.0, 2.0, 1.0])
    assert not caplog.text


@pytest.mark.parametrize(("losses", "weight"), [([3.0, 1.0, 2.0], 1.0), ([3.0, 2.0, 1.0], 2.0), ([1.0, 2.0, 3.0], 0.0)])
def test_a_resumed_run_knows_the_lowest_loss_before_its_checkpoint(tmp_path, losses, weight):
    """Two steps, a checkpoint, and a third step with a higher loss."""
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    _, _, stopping = train(losses)
    stopping.on_save(arguments(output_dir=tmp_path), TrainerState(global_step=2), TrainerControl())
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    resumed = HeldOutStopping(model, METRIC, num_evaluated=1)
    state, control = TrainerState(max_steps=3, global_step=2), TrainerControl()
    args = arguments(resume_from_checkpoint=str(checkpoint))
    resumed.on_train_begin(args, state, control)
    assert list(resumed.losses.values()) == losses
    model.weight.data.fill_(3.0)
    state.global_step = 3
    resumed.on_evaluate(args, state, control, {METRIC: 9.0})
    resumed.on_train_end(args, state, control)
    assert model.weight.item() == weight


def test_a_resumed_run_without_earlier_losses_says_so(tmp_path, caplog):
    resumed = HeldOutStopping(nn.Linear(1, 1), METRIC, num_evaluated=1)
    args = arguments(resume_from_checkpoint=str(tmp_path))
    resumed.on_train_begin(args, TrainerState(max_steps=3, global_step=2), TrainerControl())
    assert "only held-out losses from step 2 on count" in caplog.text


def test_a_run_that_starts_over_forgets_its_losses():
    _, _, stopping = train([3.0, 1.0, 2.0])
    stopping.on_train_begin(arguments(), TrainerState(max_steps=2), TrainerControl())
    assert not stopping.losses
