"""BOS at the start of text windows, and calibration on several texts, through the entry scripts."""

import json
import shutil
from pathlib import Path

import pytest

import model_finetune
import model_slimming
from slim_utils.common.errors import UserError
from tests.conftest import random_text
from train_utils.finetune_args import parse_args


def main(*arguments: str) -> None:
    """Prune in this process."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))


@pytest.fixture(scope="module")
def bos_checkpoint(tmp_path_factory, checkpoint, bos_tokenizer) -> Path:
    """The checkpoint with a tokenizer that adds a BOS."""
    folder = tmp_path_factory.mktemp("bos") / "tiny-llama"
    shutil.copytree(checkpoint, folder)
    bos_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def other_file(tmp_path) -> Path:
    """A second text."""
    path = tmp_path / "other.txt"
    path.write_text(random_text(4000, 7))
    return path


def test_model_slimming_of_a_tokenizer_that_adds_bos_uses_it(bos_checkpoint, text_file, other_file, tmp_path, caplog):
    caplog.set_level("INFO")
    argv = [
        bos_checkpoint,
        "--data_file",
        text_file,
        other_file,
        "--num_samples",
        16,
        "--seqlen",
        32,
        "--sparsity",
        0.5,
    ]
    argv += ["--preset", "best", "--eval_datasets", f"mine={text_file}", "--eval_seqlens", 32, "--save_pruned_weights"]
    records = {}
    for bos in ("auto", "never"):
        main(*argv, "--bos", bos, "--save_dir", tmp_path / bos)
        records[bos] = json.loads((tmp_path / bos / "run.json").read_text())
    assert [records[bos]["calibration"]["bos"] for bos in records] == [True, False]
    assert [records[bos]["perplexity"][0]["bos"] for bos in records] == [True, False]
    # Sink windows replace a missing BOS.
    assert [records[bos]["arguments"]["sink_windows"] for bos in records] == [0, 512]
    assert [source["num_samples"] for source in records["auto"]["calibration"]["sources"]] == [8, 8]
    assert "windows start with a BOS (--bos)" in caplog.text
    card = (tmp_path / "auto" / "pruned_weights" / "README.md").read_text()
    assert "| first token of a sample | BOS |" in card
    assert "| mine | 32 | BOS |" in card


def test_model_slimming_of_an_unknown_calibration_text_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"--data_file nowhere\.txt: no such file"):
        main(checkpoint, "--data_file", "c4", "nowhere.txt")
    with pytest.raises(UserError, match="--data_file nowhere: neither a file nor one of wikitext2, c4"):
        main(checkpoint, "--data_file", "c4", "nowhere:2")
    with pytest.raises(UserError, match=r"c4 and --data_file exclude each other; .* --data_file c4 wikitext2:2$"):
        main(checkpoint, "c4", "--data_file", "wikitext2:2")
    with pytest.raises(UserError, match="--data_file c4:half: the weight half is not a number"):
        main(checkpoint, "--data_file", "c4:half")


def test_model_slimming_of_a_weighted_mixture_records_the_samples_of_each_text(
    checkpoint, text_file, other_file, tmp_path
):
    argv = [checkpoint, "--num_samples", 10, "--seqlen", 32, "--sparsity", 0.5, "--skip_evaluate"]
    main(*argv, "--data_file", f"{text_file}:0.7", f"{other_file}:0.3", "--save_dir", tmp_path / "out")
    sources = json.loads((tmp_path / "out" / "run.json").read_text())["calibration"]["sources"]
    assert [(source["name"], source["num_samples"]) for source in sources] == [
        (str(text_file), 7),
        (str(other_file), 3),
    ]
    with pytest.raises(UserError, match=f"--data_file {text_file}: given twice"):
        main(*argv, "--data_file", text_file, f"{text_file}:0.3", "--save_dir", tmp_path / "twice")


def test_model_finetune_of_a_tokenizer_that_adds_bos_measures_with_it(
    bos_checkpoint, text_file, instruction_file, tmp_path
):
    argv = ["--model_name_or_path", bos_checkpoint, "--data_path", instruction_file, "--output_dir", tmp_path / "out"]
    argv += ["--max_steps", 1, "--per_device_train_batch_size", 2, "--val_dataset_size", 4, "--cache_dataset", "false"]
    argv += ["--max_length", 32, "--extra_val_set", f"mine={text_file}", "--extra_val_seqlen", 16, "--use_cpu", "true"]
    argv += ["--prompt_template_name", "none", "--eval_seqlens", 16]
    model_finetune.main(parse_args(list(map(str, argv))))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [entry["bos"] for entry in record["perplexity"]["before"]] == [True]


def test_parse_args_of_an_unknown_bos_policy_is_refused():
    with pytest.raises((UserError, SystemExit)):
        parse_args(["--model_name_or_path", "x", "--output_dir", "y", "--bos", "sometimes"])
