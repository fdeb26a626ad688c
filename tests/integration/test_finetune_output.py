"""Output folders of ``model_finetune.py``: inputs are never replaced, earlier results only by complete ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slim_utils.common.errors import UserError
from slim_utils.masks import PRUNING_FILE
from tests.integration.finetuning import losses, main
from train_utils.sparse_trainer import SlimTrainer

CHECKPOINTS = ["--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1]


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of all files of a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stop_at(monkeypatch):
    """Function that makes training stop with KeyboardInterrupt before a step."""
    real = SlimTrainer.training_step

    def stop(step: int | None) -> None:
        def training_step(self, *args, **kwargs):
            if step is not None and self.state.global_step == step:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        monkeypatch.setattr(SlimTrainer, "training_step", training_step)

    return stop


@pytest.fixture
def earlier(slim, tmp_path) -> Path:
    """A copy of the pruned model's folder."""
    return Path(shutil.copytree(slim, tmp_path / "earlier"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model_name_or_path", "{earlier}/pruned_weights"),
        ("--distill_from", "{earlier}"),
        ("--data_path", "{earlier}/rows.jsonl"),
        ("--data_path", "{link}/rows.jsonl"),
        ("--extra_val_set", "mine={earlier}/text.txt"),
        ("--mask_config_dir", "{earlier}/pruning.json"),
        ("--mask_config_dir", "{earlier}"),
        ("--resume_from_checkpoint", "{earlier}/pruned_weights/checkpoint-2"),
    ],
)
def test_finetune_with_an_input_inside_its_output_is_refused(
    slim, earlier, argv, tmp_path, instruction_file, text_file, flag, value
):
    shutil.copy(instruction_file, earlier / "rows.jsonl")
    shutil.copy(text_file, earlier / "text.txt")
    (earlier / "pruned_weights" / "checkpoint-2").mkdir()
    (earlier / "pruned_weights" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "link").symlink_to(earlier)
    value, before = value.format(earlier=earlier, link=tmp_path / "link"), contents(earlier)
    flags = ["--is_mask_training", "true"] if flag == "--mask_config_dir" else []
    with pytest.raises(UserError, match=f"{flag} .*: inside --output_dir .*; choose another --output_dir"):
        main([*argv(slim, "--output_dir", earlier, "--overwrite", "true", *flags), flag, value])
    assert contents(earlier) == before


@pytest.mark.parametrize("lora", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_finetune_overwrite_keeps_the_earlier_result_until_the_new_one_is_complete(slim, argv, tmp_path, stop_at, lora):
    arguments, out = argv(slim / "pruned_weights", "--use_lora", lora, *CHECKPOINTS), tmp_path / "out"
    main(arguments)
    (out / "stale").mkdir()
    before = contents(out)
    whole = losses(out)

    stop_at(4)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--learning_rate", "2e-3", "--overwrite", "true"])
    kept = contents(out)
    assert {name: kept[name] for name in before} == before
    # The other files are those of the new run, which it resumes from.
    assert {name.split("/")[0] for name in kept.keys() - before.keys()} == {".unfinished"}
    stop_at(None)
    main([*arguments, "--learning_rate", "2e-3", "--resume_from_checkpoint", "true"])
    resumed = losses(out)
    assert resumed.keys() == whole.keys() and resumed[1] == whole[1] and resumed[5] != whole[5]
    assert not (out / "stale").exists() and not (out / ".unfinished").exists()
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    weights = "adapter_model.safetensors" if lora == "true" else "model.safetensors"
    resumed = load_file(out / weights)

    main([*arguments, "--learning_rate", "2e-3", "--overwrite", "true"])
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in load_file(out / weights).items())
    assert not list(tmp_path.glob(".*")) and not list(out.glob(".*"))


def test_finetune_resume_takes_no_checkpoint_of_the_earlier_run(slim, argv, tmp_path, stop_at):
    arguments, out = argv(slim / "pruned_weights", "--use_lora", "true", *CHECKPOINTS), tmp_path / "out"
    main(arguments)
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--overwrite", "true"])
    stop_at(None)
    with pytest.raises(UserError, match=r"--resume_from_checkpoint true: no complete checkpoint in .*\.unfinished"):
        main([*arguments, "--resume_from_checkpoint", "true"])
    # A checkpoint of the earlier run is used if given by path.
    main([*arguments, "--resume_from_checkpoint", str(out / "checkpoint-4")])
    assert not (out / ".unfinished").exists()
    # A run with --overwrite does not resume from an earlier attempt.
    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--overwrite", "true"])
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--overwrite", "true"])
    assert [path.name for path in (out / ".unfinished").iterdir()] == ["run.json"]


def test_finetune_overwrite_that_cannot_move_its_result_restores_the_earlier_one(slim, argv, tmp_path, monkeypatch):
    arguments, out = argv(slim / "pruned_weights", "--use_lora", "true"), tmp_path / "out"
    main(arguments)
    before, real = contents(out), Path.rename

    def rename(self, target):
        if self.parent.name == ".unfinished" and self.name == "run.json":
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"):
        main([*arguments, "--overwrite", "true"])
    kept = contents(out)
    assert {name: kept[name] for name in before} == before
    assert (out / ".unfinished" / "run.json").is_file()


def test_finetune_resume_from_another_folder_checks_the_output(slim, argv, earlier, tmp_path):
    arguments = argv(slim / "pruned_weights", "--use_lora", "true", *CHECKPOINTS)
    main(arguments)
    checkpoint, before = tmp_path / "out" / "checkpoint-4", contents(earlier)
    resume = [*arguments, "--resume_from_checkpoint", str(checkpoint), "--output_dir"]
    with pytest.raises(UserError, match=r"--output_dir .*earlier: exists; choose another or pass --overwrite"):
        main([*resume, str(earlier)])
    assert contents(earlier) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="not the output of an earlier run"):
        main([*resume, str(mine), "--overwrite", "true"])
    assert contents(mine) == {"config.json": b'{"mine": 1}'}

    whole = losses(tmp_path / "out")
    main([*resume, str(tmp_path / "new")])
    assert losses(tmp_path / "new") == pytest.approx(whole, rel=1e-6)
    main([*resume, str(earlier), "--overwrite", "true"])
    assert losses(earlier) == pytest.approx(whole, rel=1e-6)
    assert not (earlier / PRUNING_FILE).exists()
    assert json.loads((earlier / "run.json").read_text())["finished"] is True
