"""Pruning, recovery and export of a LLaMA with a SentencePiece model keep the file and the tokens."""

import shutil

import pytest
from transformers import AutoTokenizer

import model_slimming
from tests.gguf_files import TEXTS, export, sentencepiece_folder, values
from tests.integration.finetuning import main as finetune
from tests.tiny_models import make_tiny

PRUNE = ["--num_samples", 8, "--seqlen", 32, "--sparsity", 0.5, "--device", "cpu", "--skip_evaluate"]


@pytest.fixture
def base(tmp_path):
    """A tiny checkpoint like LLaMA 1: ``tokenizer.model``, no ``tokenizer.json``, a space after special tokens."""
    make_tiny("gqa", vocab_size=400).save_pretrained(tmp_path / "base")
    return sentencepiece_folder(tmp_path / "base", legacy=True)


def assert_same_tokenizer(folder, base):
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    texts = [*TEXTS, "<s>Market</s>Market"]
    got, expected = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    assert [got(text).input_ids for text in texts] == [expected(text).input_ids for text in texts]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_model_slimming_keeps_the_sentencepiece_model(base, text_file, tmp_path, stream):
    argv = [base, "--data_file", text_file, *PRUNE, "--save_pruned_weights", "--save_dir", tmp_path / "out", *stream]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))
    for folder in (tmp_path / "out", tmp_path / "out/pruned_weights"):
        assert_same_tokenizer(folder, base)
    shutil.rmtree(base)
    keys = values(export(tmp_path / "out/pruned_weights"))
    assert keys["tokenizer.ggml.add_space_prefix"] is True and keys["general.name"] == "out"


@pytest.mark.parametrize("lora", [True, False])
def test_model_finetune_keeps_the_sentencepiece_model(base, argv, tmp_path, lora):
    finetune(argv(base, "--use_lora", str(lora).lower(), "--max_steps", "1"))
    assert_same_tokenizer(tmp_path / "out/lora_fused_model" if lora else tmp_path / "out", base)
