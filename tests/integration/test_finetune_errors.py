"""``model_finetune.py`` with wrong input, losses that are not finite, a full disk, and stopped while it runs."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_utils.common.errors import RankError, UserError, is_disk_full
from tests.integration.finetuning import main, run
from tests.processes import run_ranks, start_python

# A run whose rank 1 meets a batch with a loss that is not finite.
OVERFLOWING = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
from train_utils import sparse_trainer
if os.environ["RANK"] == "1":
    step = sparse_trainer.Seq2SeqTrainer.training_step
    sparse_trainer.Seq2SeqTrainer.training_step = lambda *args: float("nan") * step(*args)
sys.argv[0] = "model_finetune.py"
runpy.run_path("model_finetune.py", run_name="__main__")
"""


def test_model_finetune_to_an_existing_output_needs_overwrite(slim, argv, tmp_path):
    arguments = argv(slim / "pruned_weights", "--use_lora", "true")
    main(arguments)
    with pytest.raises(UserError, match=r"--output_dir .*: exists; choose another or pass --overwrite"):
        main(arguments)
    (tmp_path / "out" / "stale").mkdir()
    main([*arguments, "--overwrite_output_dir", "true"])
    assert not (tmp_path / "out" / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match="not the output of an earlier run"):
        main([*arguments, "--output_dir", str(tmp_path / "mine"), "--overwrite", "true"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quantization_bit 8", "--quantization_bit 8: training quantised weights is not supported"),
        ("--auto_load true", "--auto_load True: use --resume_from_checkpoint true"),
        ("--is_sparse_training true", "--is_sparse_training True: sparsity penalties are not supported"),
        ("--coef 0.1", "--coef 0.1: sparsity penalties are not supported"),
        ("--lr_multi 10", "--lr_multi 10.0: sparsity penalties are not supported"),
        ("--extra_trainset true", "--extra_trainset True: put all rows into one file"),
        ("--mask_config_dir x", "--mask_config_dir has no effect without --is_mask_training true"),
        ("--peft_lora_bias some", "--peft_lora_bias some: choose one of none, all, lora_only"),
        ("--peft_lora_r 0", "--peft_lora_r 0: at least 1"),
        ("--peft_lora_dropout 2", "--peft_lora_dropout 2: at least 0 and below 1"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: at least 1"),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0: at least 1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: at least 1"),
        (
            "--dataloader_drop_last true --per_device_train_batch_size 99",
            "--dataloader_drop_last true: 40 samples are fewer than the 99 of a batch",
        ),
        ("--dataloader_num_workers -1", "--dataloader_num_workers -1: at least 0"),
        ("--num_train_epochs 0", "--num_train_epochs 0: above 0"),
        ("--num_train_epochs nan", "--num_train_epochs nan: above 0"),
        ("--seed -1", "--seed -1: between 0 and 2"),
        ("--fp16 true --use_cpu true", "--fp16 true: needs a GPU; use --bf16 true"),
        ("--prompt_template_name vicuna", "--prompt_template_name vicuna: choose one of alpaca, alpaca_zh, none, chat"),
        ("--max_length 1", "--max_length 1: at least 2"),
        ("--extra_val_set c4", "--extra_val_set c4: neither one of wikitext2, ptb nor an existing file"),
        ("--eval_seqlens 1", "--eval_seqlens: at least 2"),
        ("--eval_seqlens 128", "--eval_seqlens 128: the model has 64 positions"),
        ("--extra_val_seqlen 128", "--extra_val_seqlen 128: the model has 64 positions"),
        ("--extra_val_set validation=pyproject.toml", "--extra_val_set: validation is the name of the held-out rows"),
        ("--extra_val_set a=pyproject.toml,a=LICENSE", "--extra_val_set: a is given twice"),
        ("--val_dataset_size 48", "48 samples, 48 of them held out; lower --val_dataset_size"),
        ("--data_path none.json", "none.json: no such file"),
        ("--peft_target_modules w_proj", "--peft_target_modules w_proj: "),
        ("--resume_from_checkpoint true", "--resume_from_checkpoint true: no complete checkpoint in"),
        ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere: not a checkpoint"),
        ("--use_focal_loss true --label_smoothing_factor 0.1", "exclude each other"),
        ("--use_focal_loss true --distill_from x", "--use_focal_loss and --distill_from exclude each other"),
        ("--distill_from=", "--distill_from: model : cannot be loaded"),
        ("--distill_from /none", "--distill_from: model /none: no such folder"),
        ("--model_name_or_path /none", "model /none: no such folder"),
        ("--is_mask_training true", "pruning.json: layer shapes differ from the model's; give the masked model"),
        ("--is_mask_training true --mask_config_dir none.json", "--mask_config_dir none.json: cannot be read"),
        ("--output_dir=", "give the folder to write: --output_dir DIR"),
    ],
)
def test_model_finetune_with_wrong_input_is_one_line_and_writes_nothing(slim, argv, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        main([*argv(slim / "pruned_weights", "--use_lora", "true"), *flags.split()])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_mask_training_with_masks_of_another_model_is_refused(slim, argv):
    pruned = slim / "pruned_weights"
    with pytest.raises(UserError, match="layer shapes differ from the model's; give the masked model"):
        main(argv(pruned, "--is_mask_training", "true", "--mask_config_dir", slim))


def test_model_finetune_with_a_non_finite_loss_is_one_line(slim, argv, tmp_path):
    with pytest.raises(UserError, match=r"step \d: the loss is (nan|inf); lower --learning_rate"):
        main(argv(slim / "pruned_weights", "--learning_rate", 1e30, "--max_grad_norm", 0))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is False
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_model_finetune_with_a_non_finite_loss_in_another_process_prints_it(slim, argv, tmp_path):
    script = tmp_path / "overflowing.py"
    script.write_text(OVERFLOWING)
    process = run_ranks(2, script, *argv(slim / "pruned_weights", "--ddp_timeout", 20))
    errors = [line for line in process.stderr.splitlines() if line.startswith("model_finetune.py: error:")]
    assert errors, process.stderr
    assert errors[-1].startswith("model_finetune.py: error: rank 1: step 1: the loss is nan; lower --learning_rate")


def test_model_finetune_of_weights_that_are_not_finite_names_them(slim, argv, tmp_path):
    base, name = tmp_path / "base", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(slim / "pruned_weights", base)
    stored = load_file(base / "model.safetensors")
    stored[name][0, 0] = float("nan")
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    for flags in (["--train", "block_weights"], ["--use_lora", "true"]):
        # Of every process: weights may be used by the tokens of one alone.
        with pytest.raises(RankError, match=r"step 1: the loss is nan: .*layers\.1\.mlp\.down_proj.* is not finite$"):
            main(argv(base, *flags, "--overwrite", "true"))


def test_model_finetune_of_a_masked_model_without_masks_warns(slim, argv, caplog):
    warning = "is a masked model, and its pruned weights are trained too; use "
    for model, flags in ((slim, []), (slim / "pruned_weights", []), (slim, ["--is_mask_training", "true"])):
        caplog.clear()
        main(argv(model, "--check_only", "true", *flags))
        assert (warning in caplog.text) == (model == slim and not flags)


def test_model_finetune_with_an_empty_folder_as_the_model_names_the_missing_file(argv, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model .*empty: .*config\.json"):
        main(argv(tmp_path / "empty"))


def test_model_finetune_with_an_unknown_flag_exits_with_one_line(argv):
    process = run(argv("/none", "--no_such_flag", 1))
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(
        "model_finetune.py: error: unrecognized arguments: --no_such_flag"
    )
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_model_finetune_when_stopped_leaves_no_partial_result(slim, argv, tmp_path, stop):
    process = start_python("model_finetune.py", *argv(slim / "pruned_weights", "--num_train_epochs", 2000))
    process.await_stderr("step 2:")
    process.send_signal(stop)
    end = process.wait(timeout=60)
    assert end.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[stop]
    assert "Traceback" not in end.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is False


def test_save_checkpoint_on_a_full_disk_removes_the_checkpoint(slim, argv, tmp_path, monkeypatch):
    real = torch.save

    def save(content, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        real(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError) as error:
        main(argv(slim / "pruned_weights", "--use_lora", "true", "--save_strategy", "steps", "--save_steps", 2))
    assert is_disk_full(error.value)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "checkpoint-2"}
