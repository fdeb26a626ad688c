"""A pruned model, and the command line that fine-tunes it."""

import shlex
from pathlib import Path

import pytest

import model_slimming

# The original's README, but for the sizes and the files.
RECIPE = shlex.split(
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 1 --lr_scheduler_type cosine "
    "--learning_rate 1e-2 --warmup_steps 1 --logging_steps 2 --logging_first_step true --evaluation_strategy steps "
    "--eval_steps 4 --max_length 64 --cache_dataset false --optim adamw_hf --val_dataset_size 8"
)


@pytest.fixture(scope="module")
def slim(tmp_path_factory, checkpoint, text_file) -> Path:
    """A pruned model: zeroed, and small in ``pruned_weights``."""
    save_dir = tmp_path_factory.mktemp("runs") / "slim"
    words = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.5]
    words += ["--skip_evaluate", "--save_pruned_weights", "--save_dir", save_dir]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, words))))
    return save_dir


@pytest.fixture
def words(instruction_file, text_file, tmp_path):
    """The recipe on local files, with a model and any further flags."""

    def build(model, *further) -> list[str]:
        files = ["--data_path", instruction_file, "--extra_val_set", f"wikitext2={text_file}", "--prompt_template_name"]
        sizes = ["none", "--extra_val_seqlen", 16, "--eval_seqlens", 16, 32, "--save_strategy", "no"]
        output = ["--model_name_or_path", model, "--output_dir", tmp_path / "out"]
        return [*RECIPE, *map(str, [*files, *sizes, *output, *further])]

    return build
