"""Flags of the Trainer in ``model_finetune.py``, and runs resumed from a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Seq2SeqTrainingArguments
from transformers.training_args import OptimizerNames

from slim_utils.common.errors import UserError
from tests.integration.finetuning import losses, main
from tests.tiny_models import make_tiny
from train_utils import optional_packages
from train_utils.finetune_args import TrainingArguments, parse_args
from train_utils.finetune_checks import check_gpu_count
from train_utils.optional_packages import optimizer_package
from train_utils.trainer_setup import best_metric

EVERY_STEP = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
CHECKPOINTS = ["--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1]
TORCH_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.mark.parametrize(
    ("more", "name", "file"),
    [
        pytest.param([], "validation", "model.safetensors", marks=pytest.mark.slow),
        (["--metric_for_best_model", "wikitext2_loss", "--use_lora", "true"], "wikitext2", "adapter_model.safetensors"),
    ],
)
def test_finetune_load_best_model_at_end_saves_the_best(slim, argv, tmp_path, more, name, file):
    # With a learning rate so high that the loss rises after the first steps.
    flags = [*EVERY_STEP, "--load_best_model_at_end", "true", "--learning_rate", 1, *more]
    out = tmp_path / "out"
    for _ in range(2):
        main(argv(slim / "pruned_weights", *flags, "--overwrite", "true"))
        log = json.loads((out / "run.json").read_text())["log"]
        evaluated = {entry["step"]: entry[f"eval_{name}_loss"] for entry in log if f"eval_{name}_loss" in entry}
        best = min(evaluated, key=evaluated.get)
        state = json.loads((out / "trainer_state.json").read_text())
        # Also if the run trained in another folder, beside an earlier result.
        assert state["best_model_checkpoint"] == str(out / f"checkpoint-{best}")
        saved, kept = (load_file(path / file) for path in (out, out / f"checkpoint-{best}"))
        assert all(torch.equal(saved[key], kept[key]) for key in kept)
    assert more or best != max(evaluated)


def test_finetune_reduce_lr_on_plateau_watches_the_validation_loss(slim, argv, tmp_path):
    flags = [*EVERY_STEP, "--lr_scheduler_type", "reduce_lr_on_plateau", "--use_lora", "true"]
    main(argv(slim / "pruned_weights", *flags))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is True


def test_best_metric_is_that_of_a_set_or_refused():
    names = ["validation", "wikitext2"]
    for name in ("loss", "eval_loss", "validation_loss", "eval_validation_loss"):
        assert best_metric(name, names) == "eval_validation_loss"
    assert best_metric("wikitext2_loss", names) == "eval_wikitext2_loss"
    assert best_metric("eval_loss", names[1:]) == "eval_wikitext2_loss"
    assert best_metric(None, []) is None
    with pytest.raises(UserError, match="--metric_for_best_model accuracy: choose one of eval_loss, eval_validation"):
        best_metric("accuracy", names)
    with pytest.raises(UserError, match="raise --val_dataset_size or pass a text with --extra_val_set"):
        best_metric("loss", [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--report_to tensorboard", "--report_to tensorboard needs .*: pip install tensorboard"),
        ("--report_to wandb", "--report_to wandb needs .*: pip install wandb"),
        ("--report_to paper", "--report_to paper: choose among none, all, azure_ml, .*wandb"),
        ("--optim paged_adamw_32bit", "--optim paged_adamw_32bit needs .*: pip install bitsandbytes"),
        ("--optim adamw_torch_4bit", "--optim adamw_torch_4bit needs .*: pip install torchao"),
        ("--use_liger_kernel true", "--use_liger_kernel true needs .*: pip install liger-kernel"),
    ],
)
def test_parse_args_without_an_optional_package_names_it(slim, argv, monkeypatch, flags, message):
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message) as error:
        parse_args([*argv(slim), *flags.split()])
    assert "\n" not in str(error.value)


def test_optimizer_package_is_known_for_every_optimizer():
    known = {name.value for name in OptimizerNames if optimizer_package(name.value)}
    assert {name.value for name in OptimizerNames} - known == TORCH_OPTIMIZERS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim rmsprop --optim_args red", "--optim rmsprop: "),
        ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr: "),
    ],
)
def test_finetune_with_settings_the_trainer_refuses_is_one_line(slim, argv, flags, message):
    with pytest.raises(UserError, match=message) as error:
        main([*argv(slim / "pruned_weights", "--use_lora", "true"), *flags.split()])
    assert "\n" not in str(error.value)


def test_finetune_resume_of_another_run_is_refused_with_the_difference(
    slim, argv, tmp_path, instruction_file, checkpoint
):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(slim / "pruned_weights", base)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = make_tiny("gqa")
    model.model.embed_tokens.weight.data += 1
    model.save_pretrained(other)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(reversed(instruction_file.read_text().splitlines(keepends=True))))
    flags = ["--use_lora", "true", *CHECKPOINTS]
    main(argv(base, *flags))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    differences = {
        "--peft_lora_r was 8, is 4": ["--peft_lora_r", 4],
        "--learning_rate was .*, is 0.5": ["--learning_rate", 0.5],
        "--train was lora, is all": ["--use_lora", "false"],
        "data was [0-9a-f]{16}, is [0-9a-f]{16}": ["--data_path", rows],
        "model was [0-9a-f]{16}, is [0-9a-f]{16}": ["--model_name_or_path", other],
        "samples of a step was 8, is 4": ["--gradient_accumulation_steps", 1],
        "teacher was None, is [0-9a-f]{16}": ["--distill_from", checkpoint],
    }
    for message, change in differences.items():
        with pytest.raises(UserError, match=rf"--resume_from_checkpoint .*: not the same run: .*{message}") as error:
            main(argv(base, *flags, "--resume_from_checkpoint", "true", *change))
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=message):
            change = [*change, "--output_dir", tmp_path / "new"]
            main(argv(base, *flags, "--resume_from_checkpoint", out / "checkpoint-2", *change))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()

    # The same model in another folder is the same run; it may train longer, and its record stays until the end.
    moved, whole = Path(shutil.move(base, tmp_path / "moved")), losses(out)
    main(argv(moved, *flags, "--resume_from_checkpoint", "true", "--num_train_epochs", 2))
    assert losses(out).keys() > whole.keys()


def test_finetune_resume_of_a_checkpoint_of_another_version_compares_what_both_have(slim, argv, tmp_path, caplog):
    flags, out = ["--use_lora", "true", *CHECKPOINTS], tmp_path / "out"
    main(argv(slim / "pruned_weights", *flags))
    checkpoint = out / "checkpoint-2"
    path = checkpoint / "run_settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("--train") == "lora" and "teacher" in settings
    del settings["teacher"]
    path.write_text(json.dumps(settings | {"--former": 1}))
    resumed = argv(slim / "pruned_weights", *flags, "--resume_from_checkpoint", checkpoint)
    with pytest.raises(UserError, match="not the same run: --peft_lora_r was 8, is 4; leave it out"):
        main([*resumed, "--peft_lora_r", "4"])
    caplog.clear()
    main(resumed)
    warning = "of another version of the suite; not compared: --former, --train, teacher"
    assert sum(warning in record.getMessage() for record in caplog.records) == 1


def test_finetune_resume_of_a_damaged_checkpoint_names_the_file(slim, argv, tmp_path):
    flags, out = ["--use_lora", "true", *CHECKPOINTS, "--stop_on_held_out", "true"], tmp_path / "out"
    main(argv(slim / "pruned_weights", *flags, "--learning_rate", 1))
    checkpoint = out / "checkpoint-4"
    files = {path for path in checkpoint.iterdir() if path.suffix in (".json", ".safetensors", ".pt", ".pth", ".bin")}
    assert {"optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "held_out_losses.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(
            UserError, match=rf"--resume_from_checkpoint .*checkpoint-4: {path.name} is damaged; choose"
        ):
            main(argv(slim / "pruned_weights", *flags, "--resume_from_checkpoint", checkpoint))
        path.write_bytes(content)


def test_finetune_again_after_an_interruption_names_the_ways_on(slim, argv, tmp_path):
    flags = ["--use_lora", "true", *CHECKPOINTS]
    main(argv(slim / "pruned_weights", *flags))
    run_file = tmp_path / "out" / "run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_text()) | {"finished": False}))
    with pytest.raises(
        UserError, match="a run was interrupted; --resume_from_checkpoint true continues it, --overwrite"
    ):
        main(argv(slim / "pruned_weights", *flags))
    main(argv(slim / "pruned_weights", *flags, "--overwrite", "true"))
    assert json.loads(run_file.read_text())["finished"]


def test_finetune_with_several_gpus_visible_trains_on_one(slim, argv, monkeypatch, caplog):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda training: vars(training)["_n_gpu"] or 2))
    training = parse_args(argv(slim / "pruned_weights")).training
    assert training.n_gpu == 1 and training.train_batch_size == training.per_device_train_batch_size
    assert "training on one of 2 GPUs; for all, start with torchrun --nproc_per_node=2" in caplog.text


def test_finetune_with_more_processes_than_gpus_is_refused(slim, argv, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda:0"))
    # Without torchrun, every process may see a GPU of its own alone.
    training = parse_args(argv(slim / "pruned_weights")).training
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    message = r"^4 processes for 2 GPUs: start with torchrun --nproc_per_node=2$"
    with pytest.raises(UserError, match=message):
        parse_args(argv(slim / "pruned_weights"))
    # The second is that of weights in host memory.
    for backend in ("nccl", "cuda:nccl,cpu:gloo"):
        training.ddp_backend = backend
        with pytest.raises(UserError, match=message):
            check_gpu_count(training)
    training.ddp_backend = "gloo"
    check_gpu_count(training)


def test_finetune_on_gpus_that_need_other_settings_of_nccl_is_one_line(slim, argv, monkeypatch):
    def refuse(training):
        raise NotImplementedError('Please set `NCCL_P2P_DISABLE="1"`\nor use another launcher.')

    monkeypatch.setattr(Seq2SeqTrainingArguments, "__post_init__", refuse)
    with pytest.raises(UserError, match="NCCL_P2P_DISABLE") as error:
        parse_args(argv(slim / "pruned_weights"))
    assert "\n" not in str(error.value)
