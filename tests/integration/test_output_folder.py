"""Output folders that another process writes, that are symbolic links, or mount points."""

import pytest

from slim_utils.errors import UserError
from train_utils.finetune_args import parse_args


@pytest.mark.parametrize("more", [[], ["--overwrite", "true"], ["--resume_from_checkpoint", "true"]])
def test_finetuning_beside_a_live_run_names_it(slim, words, more, tmp_path, lock_holder):
    process = lock_holder(tmp_path / "out")
    with pytest.raises(UserError, match=f"--output_dir .*out: process {process.pid} on .* writes it"):
        parse_args(words(slim / "pruned_weights", *more))
