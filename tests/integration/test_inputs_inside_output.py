"""No script replaces what it reads; what ``model_finetune.py`` may replace is in ``test_finetune_output.py``."""

import json
import shutil
from pathlib import Path

import pytest

import model_evaluate
import model_slimming
from scripts import compare_models, export_gguf, report
from slim_utils.common.errors import UserError
from slim_utils.pruning_config import PruningConfig


def parsed(script, *argv: object):
    """The command line of a script, read."""
    return script.build_parser().parse_args(list(map(str, argv)))


@pytest.fixture
def output(tmp_path, checkpoint, text_file) -> Path:
    """A folder that looks like an earlier output, with a model and texts in it."""
    folder = tmp_path / "out"
    shutil.copytree(checkpoint, folder)
    shutil.copy(text_file, folder / "text.txt")
    for name in ("run.json", "index.html", "profile.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("inputs", "flag"),
    [
        (["{out}", "--data_file", "{text}"], "MODEL"),
        (["{model}", "--data_file", "{out}/text.txt"], "--data_file"),
        (["{model}", "--data_file", "{out}/text.txt:2", "{text}"], "--data_file"),
        (["{model}", "--data_file", "{text}", "--profile", "{out}/profile.json"], "--profile"),
        (["{model}", "--data_file", "{text}", "--eval_datasets", "a={out}/text.txt"], "--eval_datasets"),
    ],
)
def test_model_slimming_with_an_input_inside_its_output_is_refused(output, checkpoint, text_file, inputs, flag):
    argv = [argument.format(out=output, model=checkpoint, text=text_file) for argument in inputs]
    args = parsed(model_slimming, *argv, "--save_dir", output, "--overwrite", "--device", "cpu")
    with pytest.raises(UserError, match=f"{flag} .*: inside --save_dir .*; choose another --save_dir"):
        model_slimming.checked(PruningConfig(**vars(args)))


def test_report_with_a_run_inside_its_output_is_refused(output):
    with pytest.raises(UserError, match=r"RUN .*: inside --out .*; choose another --out"):
        report.main(parsed(report, output / "run.json", "--out", output, "--overwrite"))


def test_compare_models_to_a_file_it_reads_is_refused(checkpoint, output):
    text = output / "text.txt"
    with pytest.raises(UserError, match=r"--eval_datasets .*: inside --out"):
        compare_models.main(parsed(compare_models, checkpoint, output, "--eval_datasets", text, "--out", text))


def test_evaluate_to_a_file_it_reads_is_refused(checkpoint, output):
    argv = ["--model", checkpoint, "--data_dir", output, "--output_path", output / "text.txt", "--overwrite"]
    with pytest.raises(UserError, match=r"--data_dir .*: inside --output_path"):
        model_evaluate.process_args(parsed(model_evaluate, *argv))


@pytest.fixture
def adapter_of_file(tmp_path) -> tuple[Path, Path]:
    """An adapter, and the GGUF file that it names as its base."""
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter"
    base.write_bytes(b"GGUF")
    adapter.mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    return adapter, base


def test_export_gguf_to_the_base_of_an_adapter_is_refused(adapter_of_file):
    adapter, base = adapter_of_file
    with pytest.raises(UserError, match=r"MODEL .*base\.gguf: inside OUT .*base\.gguf, which the run replaces"):
        export_gguf.main(parsed(export_gguf, adapter, base, "--overwrite"))
    assert base.read_bytes() == b"GGUF"


def test_evaluate_to_the_base_of_an_adapter_is_refused(adapter_of_file):
    adapter, base = adapter_of_file
    with pytest.raises(UserError, match=r"--model .*base\.gguf: inside --output_path"):
        model_evaluate.process_args(parsed(model_evaluate, "--model", adapter, "--output_path", base, "--overwrite"))


def test_compare_models_to_the_base_of_an_adapter_is_refused(adapter_of_file, checkpoint):
    adapter, base = adapter_of_file
    with pytest.raises(UserError, match=r"base\.gguf: inside --out"):
        compare_models.main(parsed(compare_models, adapter, checkpoint, "--out", base))


def test_export_gguf_with_overwrite_only_replaces_gguf_files(output):
    weights = output / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(UserError, match=r"OUT .*model\.safetensors: not a GGUF file; not overwritten"):
        export_gguf.main(parsed(export_gguf, output, weights, "--overwrite"))
    assert weights.read_bytes() == before
