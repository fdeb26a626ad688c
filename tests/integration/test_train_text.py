"""``model_finetune.py --train_text``: windows of plain text, parts of the model, and the dense model as teacher."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model, load_tokenizer
from slim_utils.text_mixture import TextSource
from tests.conftest import random_text
from tests.integration.finetuning import logits, losses, main, run
from train_utils import model_weights
from train_utils.finetune_args import parse_args
from train_utils.learning_rate import layer_matrices, root_mean_square, text_learning_rate
from train_utils.packed_text import TextSettings, load_text_data
from train_utils.text_defaults import TEXT_DEFAULTS, with_text_defaults


@pytest.fixture
def text_argv(tmp_path, text_file):
    """Function that builds the arguments of a run on a text for a model and more flags."""
    text = tmp_path / "train.txt"
    text.write_text(random_text(3000, 5))

    def build(model, *flags) -> list[str]:
        argv = ["--model_name_or_path", model, "--output_dir", tmp_path / "out", "--train_text", text]
        argv += ["--max_length", 32, "--val_dataset_size", 4, "--max_train_tokens", 1024, "--cache_dataset", "false"]
        argv += ["--save_strategy", "no", "--extra_val_set", f"text={text_file}", "--extra_val_seqlen", 16]
        return list(map(str, [*argv, "--eval_seqlens", 16, "--logging_steps", 1, *flags]))

    return build


@pytest.mark.parametrize("part", ["lora", "all", "block_weights", "scales"])
def test_distillation_on_text_of_every_part_lowers_the_loss(slim, text_argv, tmp_path, checkpoint, samples, part):
    base, out = slim / "pruned_weights", tmp_path / "out"
    # The cross-entropy of a model that learns from a random teacher rises.
    flags = ["--train", part, "--distill_from", checkpoint, "--stop_on_held_out", "false"]
    main(text_argv(base, *flags, "--learning_rate", 2e-3, "--num_train_epochs", 4))
    trained = losses(out)
    first, last = (sum(list(trained.values())[part]) for part in (slice(16), slice(-16, None)))
    assert last < 0.97 * first
    record = json.loads((out / "run.json").read_text())
    assert record["data"]["train_samples"] == 32 and record["data"]["validation_samples"] == 4
    saved = out / "lora_fused_model" if part == "lora" else out
    before, after = load_file(base / "model.safetensors"), load_file(saved / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if part == "scales":
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"o_proj", "down_proj"}
    elif part != "all":
        assert changed and all(".layers." in name for name in changed)
    else:
        assert "model.embed_tokens.weight" in changed
    assert not torch.equal(logits(saved, samples), logits(base, samples))
    card = (saved / "README.md").read_text()
    assert "| windows | 32 |" in card and "train.txt" in card


def test_train_text_without_a_learning_rate_takes_that_of_the_models_weights(slim, text_argv, tmp_path, caplog):
    base, out = slim / "pruned_weights", tmp_path / "out"
    with caplog.at_level("INFO"):
        main(text_argv(base, "--train", "lora"))
    model = load_model(str(base), "auto", False)
    magnitude = root_mean_square(layer_matrices(model))
    rate = text_learning_rate("lora", magnitude, model.config.hidden_size)
    assert f"--learning_rate {rate:g}, the default for weights" in caplog.text
    assert json.loads((out / "run.json").read_text())["arguments"]["learning_rate"] == rate
    assert f"| learning rate | {rate:g} |" in (out / "lora_fused_model" / "README.md").read_text()


@pytest.mark.parametrize("part", ["lora", "block_weights"])
def test_train_text_of_weights_that_are_not_finite_names_them(slim, text_argv, tmp_path, part):
    base, name = tmp_path / "base", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(slim / "pruned_weights", base)
    stored = load_file(base / "model.safetensors")
    stored[name][0, 0] = float("nan")
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"model .*base: {name} is not finite$"):
        main(text_argv(base, "--train", part))
    # With a given rate, the loss of the first step is not finite.
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj.* is not finite$"):
        main(text_argv(base, "--train", part, "--learning_rate", 1e-3, "--overwrite", "true"))


def test_train_text_without_teacher_trains_on_every_token(slim, text_argv, tmp_path):
    main(text_argv(slim / "pruned_weights", "--train", "block_weights", "--learning_rate", 0, "--num_train_epochs", 1))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    model = load_model(str(slim / "pruned_weights"), "auto", False)
    tokenizer = load_tokenizer(str(slim / "pruned_weights"), False)
    source = TextSource(str(tmp_path / "train.txt"), 1)
    data = load_text_data([source], tokenizer, TextSettings(32, 1024, 4, None), {}, None)
    ids = torch.tensor(data.train["input_ids"][:])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert record["log"][-1]["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_train_text_keeps_the_weights_of_the_lowest_held_out_loss(slim, text_argv, tmp_path, checkpoint, caplog):
    base, out = slim / "pruned_weights", tmp_path / "out"
    # The cross-entropy of a model that learns from a random teacher rises.
    main(text_argv(base, "--distill_from", checkpoint, "--learning_rate", 2e-3, "--num_train_epochs", 4))
    record = json.loads((out / "run.json").read_text())
    held_out = {
        entry["step"]: entry["eval_validation_loss"] for entry in record["log"] if "eval_validation_loss" in entry
    }
    # Of the evaluation texts, none decides.
    assert not any("eval_text_loss" in entry for entry in record["log"])
    assert min(held_out, key=held_out.get) == 0 and len(held_out) > 1
    assert record["held_out"] == {"kept_step": 0, "losses": {str(step): loss for step, loss in held_out.items()}}
    assert "| step with the lowest held-out loss | 0 |" in (out / "README.md").read_text()
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "step 0 is kept" in caplog.text and "lower --learning_rate" in caplog.text


def test_train_text_resumed_keeps_the_weights_of_the_whole_run(slim, text_argv, tmp_path, checkpoint):
    flags = ["--distill_from", checkpoint, "--learning_rate", 2e-3, "--save_strategy", "steps", "--save_steps", 8]
    flags += ["--lr_scheduler_type", "constant"]
    main(text_argv(slim / "pruned_weights", *flags, "--output_dir", tmp_path / "half", "--max_steps", 8))
    argv = text_argv(slim / "pruned_weights", *flags, "--output_dir", tmp_path / "rest", "--num_train_epochs", 2)
    main([*argv, "--resume_from_checkpoint", str(tmp_path / "half" / "checkpoint-8")])
    record = json.loads((tmp_path / "rest" / "run.json").read_text())
    assert record["held_out"]["kept_step"] == 0 and min(map(int, record["held_out"]["losses"])) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (slim / "pruned_weights", tmp_path / "rest"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_train_text_resumed_with_another_number_of_tokens_names_the_flag(slim, text_argv, tmp_path):
    flags = ["--train", "scales", "--save_strategy", "steps", "--save_steps", 8, "--max_train_tokens", 512]
    main(text_argv(slim / "pruned_weights", *flags))
    flags += ["--resume_from_checkpoint", "true", "--max_train_tokens", 1024]
    with pytest.raises(UserError, match=r"not the same run: --max_train_tokens was 512\.0, is 1024\.0; data was"):
        main(text_argv(slim / "pruned_weights", *flags))


def test_train_text_without_stopping_on_held_out_ends_with_the_last_weights(slim, text_argv, tmp_path):
    base, out = slim / "pruned_weights", tmp_path / "out"
    main(text_argv(base, "--learning_rate", 10, "--stop_on_held_out", "false"))
    record = json.loads((out / "run.json").read_text())
    assert not any("eval_validation_loss" in entry for entry in record["log"])
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_check_only_reads_the_texts_and_trains_nothing(slim, text_argv, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(model_weights, "load_model", lambda *args: pytest.fail("loaded"))
    base, empty = slim / "pruned_weights", tmp_path / "empty.jsonl"
    flags = ["--check_only", "true", "--distill_from", checkpoint]
    main(text_argv(base, *flags))
    empty.touch()
    with pytest.raises(UserError, match=r"--train_text .*empty.jsonl: no text in it"):
        main(text_argv(base, *flags, "--train_text", tmp_path / "train.txt", empty))
    empty.write_text('{"words": "w3"}')
    with pytest.raises(UserError, match=r"empty\.jsonl: row 0: no column text"):
        main(text_argv(base, *flags, "--train_text", empty))
    with pytest.raises(UserError, match="row 0: no column text"):
        main(text_argv(base, *flags, "--extra_val_set", f"text={empty}"))
    with pytest.raises(UserError, match="--eval_seqlens 128: the model has 64 positions"):
        main(text_argv(base, *flags, "--eval_seqlens", 128))
    other = shutil.copy(tmp_path / "train.txt", tmp_path / "other.txt")
    with pytest.raises(UserError, match=r"other.txt: none of \d+ windows by its weight; raise it"):
        main(text_argv(base, *flags, "--train_text", tmp_path / "train.txt", f"{other}:0.0001"))
    assert not (tmp_path / "out").exists()


def test_check_only_of_instructions_reads_them(slim, argv, tmp_path, monkeypatch):
    monkeypatch.setattr(model_weights, "load_model", lambda *args: pytest.fail("loaded"))
    main(argv(slim / "pruned_weights", "--check_only", "true"))
    with pytest.raises(UserError, match="48 samples, 100 of them held out; lower --val_dataset_size"):
        main(argv(slim / "pruned_weights", "--check_only", "true", "--val_dataset_size", 100))
    assert not (tmp_path / "out").exists()


def test_train_text_skips_what_calibrated_the_model(slim, text_argv, tmp_path, text_file):
    process = run(text_argv(slim / "pruned_weights", "--train_text", text_file, "--extra_val_set", "none"))
    assert process.returncode == 0, process.stderr
    assert "windows skipped that overlap with the calibration samples of the model" in process.stderr


def test_parse_args_with_train_text_sets_the_defaults_of_text(slim, text_argv):
    args = parse_args(text_argv(slim / "pruned_weights", "--train", "scales"))
    assert args.model_sets_learning_rate
    assert args.training.lr_scheduler_type == TEXT_DEFAULTS["--lr_scheduler_type"]
    # A flag of the user wins.
    assert args.data.max_length == 32
    args = parse_args(text_argv(slim / "pruned_weights", "--learning_rate", 1e-6, "--use_lora", "true"))
    assert args.training.learning_rate == 1e-6 and args.model.peft_lora_r == 16
    assert not args.model_sets_learning_rate
    assert args.model.trained_part == "lora"
    assert parse_args(text_argv(slim / "pruned_weights")).model.trained_part == "block_weights"


def test_parse_args_of_flags_with_dashes_are_those_with_underscores(slim, text_argv):
    argv = text_argv(slim / "pruned_weights", "--learning_rate", 1e-6, "--use_lora=true", "--evaluation_strategy", "no")
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in argv]
    plain, other = parse_args(argv), parse_args(dashed)
    assert other.flat() == plain.flat()
    assert other.training.learning_rate == 1e-6 and other.model.peft_lora_r == TEXT_DEFAULTS["--peft_lora_r"]


TEXT_ONLY, ROWS_ONLY = ["--skip_train_tokens", 8, "--max_train_tokens=512"], ["--train_data", "alpaca"]


@pytest.mark.parametrize(
    ("has_text", "flags", "message"),
    [
        (False, TEXT_ONLY, "--max_train_tokens, --skip_train_tokens have no effect without --train_text"),
        (False, ROWS_ONLY, "--train_data has no effect with --data_path"),
        (True, ROWS_ONLY, "--train_data has no effect with --train_text"),
        (True, ["--train-full-prompt", "true"], "--train_full_prompt has no effect with --train_text"),
        (False, ["--peft_lora_r", 4], "--peft_lora_r has no effect without --train lora"),
        (True, ["--focal_loss_gamma", 2], "--focal_loss_gamma has no effect without --use_focal_loss true"),
        (True, ["--cache_dir", "x"], "--cache_dir has no effect with --cache_dataset false"),
        (False, ["--save_pruned_weights", "false"], "--save_pruned_weights has no effect without --is_mask_training"),
        (
            True,
            ["--extra_val_set", "none"],
            "--extra_val_seqlen, --eval_seqlens have no effect with --extra_val_set none",
        ),
        (False, ["--fsdp_config", "configs/fsdp2.json"], "--fsdp_config has no effect without --fsdp true"),
        (True, ["--eval_steps", 4], "--eval_steps has no effect without --eval_strategy steps"),
        (True, ["--save_steps", 4], "--save_steps has no effect without --save_strategy steps"),
        (True, ["--skip_train_tokens", 8, "--use_lora", "true", "--peft_lora_r", 4], None),
        (True, ["--eval_steps=4", "--eval_strategy=steps", "--save_steps=4", "--save_strategy=steps"], None),
        (False, ["--prompt_template_name", "chat", "--train", "lora", "--peft_lora_alpha", 4], None),
    ],
)
def test_parse_args_of_flags_without_effect_warns(slim, text_argv, argv, has_text, flags, message, caplog):
    parse_args((text_argv if has_text else argv)(slim / "pruned_weights", *flags))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(message)
    assert message is None or warnings[0].startswith(message)


@pytest.mark.parametrize(
    ("in_bf16", "flags", "expected"),
    [
        (True, [], ["--bf16", "true"]),
        (False, [], []),
        (True, ["--bf16", "false"], []),
        (True, ["--fp16=true"], []),
        (True, ["--use_cpu", "true"], []),
    ],
)
def test_train_text_on_a_gpu_with_bf16_is_in_mixed_precision(in_bf16, flags, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: in_bf16)
    argv = ["--train_text", "c4", *flags]
    words = with_text_defaults(argv)
    assert words[len(words) - len(argv) :] == argv
    defaults = words[: len(words) - len(argv)]
    assert (defaults[-2:] if "--bf16" in defaults else []) == expected
    assert with_text_defaults(flags) == flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_text", "none.txt"], "--train_text none.txt: no such file"),
        (["--data_path", "x.json"], "--train_text and --data_path exclude each other"),
        (["--max_train_tokens", 31], "--max_train_tokens 31: at least --max_length 32"),
        (["--max_train_tokens", "nan"], "--max_train_tokens nan: at least"),
        (["--max_train_tokens", "inf"], "--max_train_tokens inf: not a number of tokens"),
        (["--learning_r", 1], "unrecognized arguments: --learning_r 1"),
        (["--skip_train_tokens", -1], "--skip_train_tokens -1: not a number of tokens; 0 skips none"),
        (["--skip_train_tokens", "inf"], "--skip_train_tokens inf: not a number of tokens"),
        (["--train", "scales", "--use_lora", "true"], "--use_lora true and --train scales exclude each other"),
        (["--train", "heads"], "--train: invalid choice"),
        (["--stop_on_held_out", "true", "--val_dataset_size", 0], "--stop_on_held_out true: nothing is held out"),
        (
            ["--stop_on_held_out", "true", "--load_best_model_at_end", "true"],
            "--stop_on_held_out and --load_best_model_at_end exclude each other",
        ),
    ],
)
def test_parse_args_with_wrong_flags_of_text_is_refused(slim, text_argv, flags, message, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        parse_args(text_argv(slim / "pruned_weights", *flags))
    assert message in str(error.value) + capsys.readouterr().err


def test_train_of_scales_resumed_continues_the_same_loss_curve(slim, text_argv, tmp_path, checkpoint):
    flags = ["--train", "scales", "--distill_from", checkpoint, "--save_strategy", "steps", "--save_steps", 8]
    flags += ["--learning_rate", 1e-2, "--save_total_limit", 1, "--lr_scheduler_type", "constant"]
    main(text_argv(slim / "pruned_weights", *flags))
    whole = losses(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    main(text_argv(slim / "pruned_weights", *flags, "--output_dir", tmp_path / "half", "--max_steps", 8))
    argv = text_argv(slim / "pruned_weights", *flags, "--output_dir", tmp_path / "rest")
    main([*argv, "--resume_from_checkpoint", str(tmp_path / "half" / "checkpoint-8")])
    rest = losses(tmp_path / "rest")
    assert {step: loss for step, loss in rest.items() if step > 8} == pytest.approx(
        {step: loss for step, loss in whole.items() if step > 8}, rel=1e-2
    )
    assert weights.keys() == load_file(tmp_path / "rest" / "model.safetensors").keys()


def test_card_of_a_mixture_names_its_texts_without_folders(slim, text_argv, tmp_path, text_file):
    other = tmp_path / "other.txt"
    other.write_text(random_text(3000, 9))
    main(
        [
            *text_argv(slim / "pruned_weights", "--train", "scales"),
            "--train_text",
            str(other),
            f"{tmp_path}/train.txt:2",
        ]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data | other.txt + train.txt |" in card
    assert str(tmp_path) not in card
