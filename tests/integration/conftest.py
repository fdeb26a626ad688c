"""Fixtures: a pruned model, the command line that fine-tunes it, and tasks that evaluate it."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks._index import TaskIndex

import model_slimming
from tests.integration.task_files import write_tasks

# The recipe in the original's README, with other sizes.
RECIPE = shlex.split(
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 1 --lr_scheduler_type cosine "
    "--learning_rate 1e-2 --warmup_steps 1 --logging_steps 2 --logging_first_step true --evaluation_strategy steps "
    "--eval_steps 4 --max_length 64 --cache_dataset false --optim adamw_hf --val_dataset_size 8"
)


@pytest.fixture(scope="module")
def slim(tmp_path_factory, checkpoint, text_file) -> Path:
    """Output folder of a pruning run: the masked model, with the pruned model in ``pruned_weights``."""
    save_dir = tmp_path_factory.mktemp("runs") / "slim"
    argv = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.5]
    argv += ["--skip_evaluate", "--save_pruned_weights", "--save_dir", save_dir]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))
    return save_dir


@pytest.fixture
def argv(instruction_file, text_file, tmp_path):
    """Function that builds the arguments of the recipe on local files for a model and more flags."""

    def build(model, *flags) -> list[str]:
        files = ["--data_path", instruction_file, "--extra_val_set", f"wikitext2={text_file}", "--prompt_template_name"]
        sizes = ["none", "--extra_val_seqlen", 16, "--eval_seqlens", 16, 32, "--save_strategy", "no"]
        output = ["--model_name_or_path", model, "--output_dir", tmp_path / "out"]
        return [*RECIPE, *map(str, [*files, *sizes, *output, *flags])]

    return build


@pytest.fixture(scope="session")
def cached_task_index() -> Iterator[None]:
    """Cache lm-eval's index of thousands of task files for the tests of this process."""
    build, indices = TaskIndex.build, {}

    def cached_build(*args, **options) -> dict[str, Any]:
        key = repr((args, options))
        if key not in indices:
            indices[key] = build(*args, **options)
        return dict(indices[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(cached_build))
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """All tasks of the original's README as local files."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder
