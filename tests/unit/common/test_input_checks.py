"""Tokens without an embedding, lengths without a position, padding without a row: one line instead of an IndexError."""

import copy
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig

import model_slimming
from model_finetune import main as finetune
from scripts import compare_models
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import (
    check_length,
    check_token_ids,
    guard_token_ids,
    num_positions,
    set_padding_token,
)
from slim_utils.common.loading import load_config
from tests.conftest import random_text
from tests.tiny_models import VOCAB, make_tiny
from train_utils.finetune_args import parse_args

BEYOND = f"token {VOCAB} \\('w900'\\), but the model has embeddings of tokens 0 to {VOCAB - 1}"


@pytest.fixture
def grown(checkpoint, tokenizer, tmp_path) -> Path:
    """A checkpoint whose tokenizer has an added word and padding token without an embedding in the model."""
    path = tmp_path / "grown"
    shutil.copytree(checkpoint, path)
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["w900"])
    more.add_special_tokens({"pad_token": "[PAD]"})
    more.save_pretrained(path)
    return path


@pytest.fixture
def other_text(tmp_path) -> Path:
    """A text that repeats a word without an embedding."""
    path = tmp_path / "other.txt"
    path.write_text(" w900 ".join(random_text(8, seed) for seed in range(100)))
    return path


def slim(model: Path, text: Path, *flags: object) -> None:
    """Run ``model_slimming.py`` in this process."""
    argv = [model, "--data_file", text, "--num_samples", 60, "--seqlen", 12, "--device", "cpu", "--sparsity", 0.3]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, [*argv, *flags]))))


def tune(model: Path, rows: Path, out: Path, *flags: object) -> None:
    """Run ``model_finetune.py`` in this process."""
    argv = ["--model_name_or_path", model, "--data_path", rows, "--output_dir", out, "--val_dataset_size", 8]
    argv += ["--extra_val_set", "none", "--prompt_template_name", "none", "--cache_dataset", "false", "--max_steps", 1]
    argv += ["--save_strategy", "no", "--per_device_train_batch_size", 2, *flags]
    finetune(parse_args(list(map(str, argv))))


def test_check_token_ids_beyond_the_embedding_names_the_token(tokenizer):
    config = LlamaConfig(vocab_size=10)
    check_token_ids(LlamaConfig(vocab_size=VOCAB), tokenizer, torch.tensor([[VOCAB - 1]]), [[0, 1], []])
    for samples in (torch.tensor([[3, 12]]), [[1], [], [12, 3]]):
        with pytest.raises(UserError, match=r"token 12 \('w12'\), but the model has embeddings of tokens 0 to 9"):
            check_token_ids(config, tokenizer, torch.zeros(0, 4), samples)


def test_check_token_ids_of_unused_tokens_names_them_in_the_log(tokenizer, caplog):
    check_token_ids(LlamaConfig(vocab_size=VOCAB - 2), tokenizer, [[3]])
    assert "2 tokens of the tokenizer ('w62', 'w63') have no embedding" in caplog.text


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (GPT2Config(n_positions=32), 32),
        (MptConfig(max_seq_len=16), 16),
        (BloomConfig(), sys.maxsize),
    ],
)
def test_num_positions_is_that_of_the_configuration(config, positions):
    assert num_positions(config) == positions


def test_check_length_beyond_the_positions_names_the_flag():
    check_length(64, LlamaConfig(max_position_embeddings=64), "--max_length")
    with pytest.raises(UserError, match="--max_length 65: the model has 64 positions"):
        check_length(65, LlamaConfig(max_position_embeddings=64), "--max_length")


@pytest.mark.parametrize("padding", [VOCAB, -VOCAB - 1])
def test_load_config_with_a_padding_id_out_of_range_names_it(padding, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "m")
    config = json.loads((checkpoint / "config.json").read_text()) | {"pad_token_id": padding}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"pad_token_id {padding} in config.json, but vocab_size is {VOCAB}"):
        load_config(str(tmp_path / "m"), False)


def test_set_padding_token_without_an_embedding_takes_another_token(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    for add, special, expected in (
        ({"pad_token": "[PAD]"}, {}, "</s>"),
        ({"pad_token": "w5"}, {}, "w5"),
        ({}, {"eos_token": None}, "<s>"),
        ({}, {"eos_token": None, "bos_token": None, "unk_token": None}, "<unk>"),
    ):
        padding = copy.deepcopy(tokenizer)
        padding.add_special_tokens(add)
        for name, token in special.items():
            setattr(padding, name, token)
        set_padding_token(padding, LlamaConfig(vocab_size=VOCAB))
        assert padding.pad_token == expected and padding.pad_token_id < VOCAB
    assert caplog.text.count("'[PAD]' has no embedding") == 1 == caplog.text.count("has no embedding")


def test_guard_token_ids_refuses_tokens_of_a_forward(samples):
    model = make_tiny("gqa")
    guard_token_ids(model)
    model(samples)
    samples[3, 4] = VOCAB
    with pytest.raises(UserError, match=f"token {VOCAB}, but the model has embeddings"):
        model(samples)


def test_model_slimming_with_tokens_beyond_the_embedding_is_one_line(grown, text_file, other_text):
    with pytest.raises(UserError, match=BEYOND):
        slim(grown, other_text, "--skip_evaluate")
    with pytest.raises(UserError, match=BEYOND):
        slim(grown, text_file, "--eval_datasets", other_text, "--eval_seqlens", 16)
    slim(grown, text_file, "--skip_evaluate")


def test_model_finetune_with_tokens_beyond_the_embedding_is_one_line(grown, instruction_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(instruction_file.read_text() + json.dumps({"instruction": "w3", "output": "w900"}) + "\n")
    with pytest.raises(UserError, match=BEYOND):
        tune(grown, rows, tmp_path / "out", "--max_length", 32)
    with pytest.raises(UserError, match="--max_length 65: the model has 64 positions"):
        tune(grown, instruction_file, tmp_path / "out", "--max_length", 65)
    assert not (tmp_path / "out").exists()


def test_model_finetune_with_padding_beyond_the_embedding_trains(grown, instruction_file, tmp_path):
    tune(grown, instruction_file, tmp_path / "out", "--max_length", 32)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_compare_models_with_tokens_or_windows_beyond_the_model_is_one_line(grown, text_file, other_text):
    for text, flags, message in (
        (other_text, ["--eval_seqlens", "16"], BEYOND),
        (text_file, ["--eval_seqlens", "65"], "--eval_seqlens 65: the model has 64 positions"),
        (text_file, ["--eval_seqlens", "16", "--prompt", "w900"], BEYOND),
    ):
        argv = [grown, grown, "--eval_datasets", text, "--device", "cpu", *flags]
        with pytest.raises(UserError, match=message):
            compare_models.measure(compare_models.build_parser().parse_args(list(map(str, argv))))


def test_model_finetune_with_samples_too_long_for_the_teacher_names_it(checkpoint, instruction_file, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "teacher")
    config = json.loads((checkpoint / "config.json").read_text()) | {"max_position_embeddings": 16}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--distill_from .*: --max_length 32: the model has 16 positions"):
        tune(checkpoint, instruction_file, tmp_path / "out", "--max_length", 32, "--distill_from", tmp_path / "teacher")
