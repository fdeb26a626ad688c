"""Output folders that another process is writing, symbolic links, and mount points."""

import json

import pytest
from transformers import AutoModelForCausalLM

import model_slimming
from slim_utils.common.errors import UserError
from tests.integration import finetuning
from train_utils.finetune_args import parse_args


@pytest.mark.parametrize("more", [[], ["--overwrite", "true"], ["--resume_from_checkpoint", "true"]])
def test_model_finetune_beside_a_live_run_names_it(slim, argv, more, tmp_path, lock_holder):
    process = lock_holder(tmp_path / "out")
    with pytest.raises(UserError, match=f"--output_dir .*out: process {process.pid} on .* is writing it"):
        parse_args(argv(slim / "pruned_weights", *more))


def prune(checkpoint, text_file, out, *more) -> None:
    """Prune ``checkpoint`` into ``out``."""
    argv = [checkpoint, "--data_file", text_file, "--num_samples", 8, "--seqlen", 32, "--sparsity", 0.4, "--device"]
    argv += ["cpu", "--eval_datasets", text_file, "--eval_seqlens", 16, "--save_dir", out, *more]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))


def check_loads(folder):
    """Check that the output is complete, has no hidden files, and loads."""
    assert json.loads((folder / "run.json").read_text())["perplexity"]
    assert not list(folder.glob(".*"))
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("mount_point", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("more", [[], ["--stream", "--save_pruned_weights"]])
def test_model_slimming_into_a_mount_point_replaces_its_entries(checkpoint, text_file, more, mount_point, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model_slimming, "write_output", stop)
        prune(checkpoint, text_file, mount_point, *more)
    assert [path.name for path in mount_point.iterdir()] == [".unfinished"]
    with pytest.raises(UserError, match="a run was interrupted; --resume continues it"):
        prune(checkpoint, text_file, mount_point, *more)
    prune(checkpoint, text_file, mount_point, *more, "--resume")
    check_loads(mount_point)
    with pytest.raises(UserError, match="exists; choose another or pass --overwrite"):
        prune(checkpoint, text_file, mount_point, *more)
    (mount_point / "of_the_earlier_run").touch()
    prune(checkpoint, text_file, mount_point, *more, "--overwrite")
    check_loads(mount_point)
    assert not (mount_point / "of_the_earlier_run").exists()
    assert [path.name for path in mount_point.parent.iterdir()] == ["volume"]


def stop(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_model_slimming_into_a_link_writes_its_target(checkpoint, text_file, more, tmp_path):
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/runs")
    for flags in ([], ["--overwrite"]):
        prune(checkpoint, text_file, tmp_path / "out", *more, *flags)
        assert (tmp_path / "out").is_symlink()
        check_loads(tmp_path / "disk" / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["runs"]


def check_tuned(folder):
    assert json.loads((folder / "run.json").read_text())["finished"]
    assert not list(folder.glob(".*"))
    AutoModelForCausalLM.from_pretrained(folder / "lora_fused_model")


@pytest.mark.parametrize("mount_point", ["tmpfs"], indirect=True)
def test_model_finetune_into_a_mount_point_replaces_its_entries(slim, argv, mount_point):
    flags = ["--use_lora", "true", "--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1]
    flags += ["--output_dir", mount_point]
    for more in (["--overwrite", "true"], ["--resume_from_checkpoint", "true"]):
        finetuning.main(argv(slim / "pruned_weights", *flags, *more))
        check_tuned(mount_point)
    assert [path.name for path in mount_point.parent.iterdir()] == ["volume"]


def test_model_finetune_into_a_link_writes_its_target(slim, argv, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/runs")
    for more in ([], ["--overwrite", "true"]):
        finetuning.main(argv(slim / "pruned_weights", "--use_lora", "true", "--max_steps", 1, *more))
        assert (tmp_path / "out").is_symlink()
        check_tuned(tmp_path / "disk" / "runs")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["runs"]
