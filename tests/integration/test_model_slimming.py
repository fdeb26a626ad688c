"""``model_slimming.py`` run as a user runs it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import model_slimming
import models  # noqa: F401 - registers the classes of pruned checkpoints
from slim_utils.common.errors import UserError
from slim_utils.common.output_folder import output_lock
from slim_utils.masks import read_pruning
from tests.conftest import random_text
from tests.processes import run_python, start_python
from tests.tiny_models import VOCAB, make_tiny

ROOT = Path(__file__).resolve().parents[2]
README_FLAGS = (
    "--minlayer 0 --maxlayer 32 --num_samples 128 --seqlen 2048 --percdamp 0 --non_uniform --non_uniform_strategy "
    "log_increase --min_sparsity 0.0625 --max_sparsity 0.25 --save_pruned_weights"
)
WEIGHT_FILES = {"model.safetensors", "config.json", "generation_config.json"}
RECORD = {"slimgpt.json"}
RUN_KEYS = ["command", "arguments", "seed", "versions", "commit", "hardware", "calibration", "provenance", "sizes"]
RUN_KEYS += ["layers", "pruning_seconds", "perplexity", "peak_memory_mib"]
SIZE_KEYS = ["parameters_dense", "block_share_removed", "parameters_pruned", "block_share_removed_in_total"]
CARD = RECORD | {"README.md"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run the script in a new process."""
    return run_python("model_slimming.py", *arguments, **options)


def main(*arguments: str) -> None:
    """Run the script in this process."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))


@pytest.fixture
def small_run(checkpoint, text_file) -> list:
    """Arguments of a short run."""
    return [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--device", "cpu"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, checkpoint, text_file) -> tuple[Path, subprocess.CompletedProcess]:
    """Output folder and process of a complete run with evaluation."""
    save_dir = tmp_path_factory.mktemp("runs") / "out"
    arguments = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.4]
    arguments += ["--eval_datasets", f"wikitext2={text_file}", "--eval_seqlens", 16, 64]
    return save_dir, run(*arguments, "--save_pruned_weights", "--save_dir", save_dir)


def test_model_slimming_outputs_are_complete(pruned):
    save_dir, process = pruned
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    names = {path.name for path in save_dir.iterdir()}
    assert names == WEIGHT_FILES | TOKENIZER_FILES | RECORD | {"pruning.json", "run.json", "pruned_weights"}
    names = {path.name for path in (save_dir / "pruned_weights").iterdir()}
    assert names == WEIGHT_FILES | TOKENIZER_FILES | CARD | {"pruning.json", "modeling_slim_llama.py"}
    assert [path.name for path in save_dir.parent.iterdir()] == ["out"]
    for folder in (save_dir, save_dir / "pruned_weights"):
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["max_new_tokens"] == 7


def test_model_slimming_logs_one_line_per_layer_without_progress_bars(pruned):
    lines = pruned[1].stderr.splitlines()
    assert sum(" INFO layer " in line for line in lines) == 4
    assert sum("perplexity wikitext2 seqlen" in line for line in lines) == 2
    assert "\r" not in pruned[1].stderr
    assert "%|" not in pruned[1].stderr


def test_model_slimming_run_json_records_the_run(pruned):
    record = json.loads((pruned[0] / "run.json").read_text())
    assert list(record) == RUN_KEYS
    assert list(record["sizes"]) == SIZE_KEYS
    assert record["seed"] == 0
    assert record["arguments"]["sparsity"] == 0.4
    assert record["command"].startswith("model_slimming.py ")
    assert set(record["versions"]) == {"slimgpt", "python", "torch", "transformers", "datasets"}
    assert len(record["calibration"]["samples_sha256"]) == 64
    assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2, 3]
    for layer in record["layers"]:
        assert layer["plan"] == {"heads": 2, "columns": 16, "experts": 0}
        assert layer["attention"]["ratio"] == pytest.approx(1 / 3)  # round(3 · 0.4) of each kv group's 3 heads
        assert layer["mlp"]["ratio"] == pytest.approx(0.4)
        assert 0 < layer["mlp"]["error_after_compensation"] < layer["mlp"]["error_before_compensation"] < 1
        assert layer["seconds"] > 0
        assert layer["peak_memory_mib"]["host"] > 0
    assert [(row["dataset"], row["seqlen"]) for row in record["perplexity"]] == [("wikitext2", 16), ("wikitext2", 64)]


def test_model_slimming_zeros_and_shapes_match_pruning_json(pruned):
    save_dir = pruned[0]
    masks = read_pruning(save_dir / "pruning.json")
    masked_model = AutoModelForCausalLM.from_pretrained(save_dir)
    pruned_model = AutoModelForCausalLM.from_pretrained(save_dir / "pruned_weights")
    assert type(masked_model).__name__ == "LlamaForCausalLM"
    assert type(pruned_model).__module__ == "models.modeling_slim_llama"
    for layer, slim_layer, mask in zip(masked_model.model.layers, pruned_model.model.layers, masks, strict=True):
        zero_columns = (layer.mlp.down_proj.weight == 0).all(dim=0).nonzero().flatten().tolist()
        assert sorted(set(range(40)) - set(mask.kept_columns)) == zero_columns
        assert slim_layer.mlp.down_proj.weight.shape == (24, len(mask.kept_columns))
        assert slim_layer.self_attn.q_proj.weight.shape == (4 * len(mask.kept_heads), 24)
        assert slim_layer.self_attn.k_proj.weight.shape == (4 * len(mask.kept_kv_heads), 24)


OUTSIDE = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
assert not any("slim_utils" in name or name == "models" for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("w3 w4 w5", return_tensors="pt")
assert AutoModel.from_pretrained(folder, trust_remote_code=True)(**inputs).last_hidden_state.shape == (1, 3, 24)
chat = tokenizer.apply_chat_template([{"role": "user", "content": "w9"}], tokenize=False)
print(json.dumps([model(**inputs).logits[0, -1].tolist(), chat, model.generate(**inputs, do_sample=False).tolist()]))
"""


def test_pruned_model_outside_the_suite_has_the_logits_of_the_masked_model(pruned, tmp_path):
    folder = pruned[0] / "pruned_weights"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    process = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(folder)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "Reading global config value" not in process.stderr
    logits, chat, generated = json.loads(process.stdout.splitlines()[-1])
    masked_model, tokenizer = (cls.from_pretrained(pruned[0]) for cls in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer("w3 w4 w5", return_tensors="pt")
    expected = masked_model(**inputs).logits[0, -1]
    assert (torch.tensor(logits) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert generated == masked_model.generate(**inputs, do_sample=False).tolist()
    assert chat == "w9"


def test_model_slimming_with_the_originals_command_line_runs(tmp_path, tokenizer, monkeypatch, caplog):
    """On a model with a depth other than 32, with C4 streamed from the hub."""
    model = tmp_path / "model"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3}
    make_tiny("mha", max_position_embeddings=2048, **heads).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = {"json": [{"text": random_text(1000)}] * 10_000, "Salesforce/wikitext": [{"text": random_text(1000)}] * 4}
    monkeypatch.setattr(datasets, "load_dataset", lambda **kwargs: rows[kwargs["path"]])
    caplog.set_level("INFO")
    main(model, "c4", *README_FLAGS.split(), "--save_dir", tmp_path / "D", "--eval_seqlens", "128")
    record = json.loads((tmp_path / "D" / "run.json").read_text())
    # Ratios 0.0625, 0.18 and 0.25 of 40 columns and of 2 heads.
    assert [layer["plan"]["columns"] for layer in record["layers"]] == [2, 7, 10]
    assert [layer["plan"]["heads"] for layer in record["layers"]] == [0, 0, 0]
    assert "perplexity wikitext2 seqlen 128" in caplog.text


def test_build_parser_keeps_names_and_defaults_of_the_original():
    args = model_slimming.build_parser().parse_args(["m", "c4"])
    expected = {
        "model_path": "m", "dataset": "c4", "num_samples": 1024, "seqlen": 2048, "sparsity": 0, "minlayer": -1,
        "maxlayer": 1000, "batch_samples": 128, "skip_evaluate": False, "save_pruned_weights": False, "save_dir": "",
        "non_uniform": False, "non_uniform_strategy": "log_increase", "min_sparsity": 0, "max_sparsity": 0,
        "no_compensate": False, "percdamp": 0.01, "seed": 0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    for dataset in ("wikitext2", "c4", "alpaca", "gpt4_alpaca"):
        assert model_slimming.build_parser().parse_args(["m", dataset, "--cache_dev", "cpu"]).dataset == dataset


def test_model_slimming_with_the_same_seed_gives_the_same_weights(small_run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(*small_run, "--sparsity", 0.4, "--skip_evaluate", "--seed", seed, "--save_dir", tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_model_slimming_without_save_dir_writes_nothing(small_run, tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    main(*small_run, "--sparsity", 0.4, "--eval_datasets", text_file, "--eval_seqlens", 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_slimming_with_a_dtype_saves_weights_in_it(small_run, tmp_path, dtype):
    flags = ["--sparsity", 0.4, "--skip_evaluate", "--dtype", dtype, "--save_dir", tmp_path / "out"]
    main(*small_run, *flags, "--save_pruned_weights")
    for folder in (tmp_path / "out", tmp_path / "out" / "pruned_weights"):
        assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)


WRONG = {
    "no data": (["{model}"], "give a data set"),
    "missing model": (["./none", "c4"], "no such folder"),
    "missing file": (["{model}", "--data_file", "none.txt", "--seqlen", "32"], "none.txt: no such file"),
    "sparsity": (["{model}", "c4", "--sparsity", "1"], "--sparsity 1.0"),
    "order": (["{model}", "c4", "--min_sparsity", ".3", "--max_sparsity", ".1"], "--min_sparsity 0.3 is above"),
    "samples": (["{model}", "c4", "--num_samples", "0"], "--num_samples 0"),
    "percdamp": (["{model}", "c4", "--percdamp", "-1"], "--percdamp -1"),
    "device": (["{model}", "c4", "--device", "tpu"], "--device tpu"),
    "no save_dir": (["{model}", "c4", "--save_pruned_weights"], "--save_pruned_weights needs --save_dir"),
    "too long": (["{model}", "--data_file", "{text}", "--seqlen", "65"], "--seqlen 65: the model has 64 positions"),
    "no layers": (["{model}", "--data_file", "{text}", "--seqlen", "32", "--minlayer", "9"], "--minlayer 9"),
    "too little text": (
        ["{model}", "--data_file", "{text}", "--seqlen", "32", "--skip_evaluate"],
        "4000 tokens, but --num_samples 1024 × --seqlen 32 need 32768",
    ),
    "unit": (["{model}", "c4", "--multiple_of", "0"], "--multiple_of 0: at least 1"),
    "uniform and not": (
        ["{model}", "c4", "--uniform_shapes", "--non_uniform", "--save_pruned_weights"],
        "--uniform_shapes needs one ratio for all layers",
    ),
    "public of nothing": (["{model}", "c4", "--hub_public"], "--hub_public applies to --push_to_hub"),
    "uniform masked": (["{model}", "c4", "--uniform_shapes"], "--uniform_shapes applies to the pruned model"),
    "uniform layers": (
        [
            *["{model}", "--data_file", "{text}", "--seqlen", "32", "--minlayer", "1", "--sparsity", ".5"],
            *["--uniform_shapes", "--save_pruned_weights"],
        ],
        "--uniform_shapes: the pruned layers differ in shape",
    ),
    "eval data": (["{model}", "--data_file", "{text}", "--eval_datasets", "c5"], "--eval_datasets c5"),
    "eval length": (
        [
            "{model}",
            "--data_file",
            "{text}",
            "--seqlen",
            "32",
            "--num_samples",
            "4",
            "--eval_datasets",
            "{text}",
            "--eval_seqlens",
            "128",
        ],
        "--eval_seqlens 128: the model has 64 positions",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_model_slimming_with_wrong_input_names_the_flag(case, checkpoint, text_file, tmp_path):
    arguments, message = WRONG[case]
    arguments = [argument.format(model=checkpoint, text=text_file) for argument in arguments]
    if case != "no save_dir":
        arguments += ["--save_dir", str(tmp_path / "out")]
    with pytest.raises(UserError) as error:
        main(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["{model} c4 --sparsity 2", "{model} c5", "{model} c4 --sparse"])
def test_model_slimming_with_wrong_input_exits_with_one_line(arguments, checkpoint):
    process = run(*arguments.format(model=checkpoint).split())
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("model_slimming.py: error: ")
    assert process.stdout == ""


def test_model_slimming_to_an_existing_output_needs_overwrite(small_run, tmp_path):
    flags = ["--sparsity", 0.4, "--skip_evaluate", "--save_dir", tmp_path / "out"]
    main(*small_run, *flags)
    before = (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(UserError, match="--overwrite"):
        main(*small_run, *flags)
    assert (tmp_path / "out" / "run.json").read_text() == before
    main(*small_run, *flags, "--overwrite", "--seed", 1)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed"] == 1


def test_model_slimming_on_a_full_disk_leaves_no_output(small_run, tmp_path, monkeypatch):
    def save_pretrained(self, folder, **kwargs):
        (Path(folder) / "tokenizer.json").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_pretrained)
    with pytest.raises(OSError, match="No space left"):
        main(*small_run, "--sparsity", 0.4, "--skip_evaluate", "--save_dir", tmp_path / "out")
    # Only the layers for --resume are left.
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_model_slimming_when_killed_leaves_no_output(tmp_path, tokenizer, text_file, signum, code):
    """The model is deep, so that the run can be killed while it prunes."""
    model = tmp_path / "model"
    make_tiny("mha", num_hidden_layers=200, intermediate_size=400).save_pretrained(model)
    tokenizer.save_pretrained(model)
    argv = [model, "--data_file", text_file, "--num_samples", 64, "--seqlen", 32, "--sparsity", 0.5]
    process = start_python("model_slimming.py", *argv, "--skip_evaluate", "--save_dir", tmp_path / "out")
    process.await_stderr(" INFO layer 3/")
    time.sleep(0.1)
    process.send_signal(signum)
    end = process.wait(timeout=60)
    assert end.returncode == code
    assert "Traceback" not in end.stderr
    assert "--resume with the same --save_dir continues" in end.stderr or signum != signal.SIGINT
    # The next run removes the stale lock file.
    locks = {".out.lock"} if signum == signal.SIGKILL else set()
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".out.unfinished"} | locks
    with output_lock(tmp_path / "out", "--save_dir"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".out.unfinished"}


def test_model_slimming_with_uniform_shapes_writes_a_stock_checkpoint(small_run, tmp_path):
    out = tmp_path / "out"
    flags = ["--uniform_shapes", "--multiple_of", 8, "--skip_evaluate", "--save_pruned_weights", "--save_dir", out]
    main(*small_run, "--sparsity", 0.5, *flags)
    folder = out / "pruned_weights"
    assert {path.name for path in folder.iterdir()} == WEIGHT_FILES | TOKENIZER_FILES | CARD | {"pruning.json"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"], config["intermediate_size"]) == ("llama", 2, 16)
    assert config["layer_head_num"] == [2] * 4
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"


def test_model_slimming_with_multiples_aligns_every_layer(small_run, tmp_path, caplog):
    flags = ["--non_uniform", "--min_sparsity", 0.1, "--max_sparsity", 0.6, "--skip_evaluate"]
    flags += ["--multiple_of", 4, "--tp_size", 2]
    main(*small_run, *flags, "--save_dir", tmp_path / "out")
    masks = read_pruning(tmp_path / "out" / "pruning.json")
    assert all(len(mask.kept_columns) % 4 == 0 and len(mask.kept_kv_heads) == 2 for mask in masks)
    assert {len(mask.kept_heads) for mask in masks} == {2, 4, 6}
    assert "cannot be aligned" not in caplog.text
    main(*small_run, *flags, "--tp_size", 8, "--save_dir", tmp_path / "other")
    assert "layers 0, 1, 2, 3 cannot be aligned: heads and key/value heads to 8, FFN columns to 8" in caplog.text


def test_checkpoint_fixture_has_the_vocabulary_of_the_tests(checkpoint):
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size == VOCAB


def test_model_slimming_records_dtype_and_device_of_every_solve(small_run, tmp_path, caplog):
    flags = ["--sparsity", 0.4, "--skip_evaluate"]
    main(*small_run, *flags, "--solve_dtype", "float32", "--save_dir", tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "run.json").read_text())["layers"]
    maps = [layer[part] for layer in layers for part in ("attention", "mlp")]
    places = {(of_map["solve_dtype"], of_map["solve_device"]) for of_map in maps}
    assert places == {("float32", "cpu")}
    masks = read_pruning(tmp_path / "out" / "pruning.json")
    main(*small_run, *flags, "--save_dir", tmp_path / "double")
    record = json.loads((tmp_path / "double" / "run.json").read_text())
    assert record["layers"][0]["mlp"]["solve_dtype"] == "float64"
    assert [mask.shape for mask in read_pruning(tmp_path / "double" / "pruning.json")] == [mask.shape for mask in masks]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens_per_forward", 0], "--tokens_per_forward 0: at least 1"),
        (["--keep_activations", -1], "--keep_activations -1.0: at least 0"),
    ],
)
def test_model_slimming_with_impossible_memory_flags_is_refused(small_run, flags, message):
    with pytest.raises(UserError, match=message):
        main(*small_run, "--sparsity", 0.4, *flags)
