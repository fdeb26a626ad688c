"""Runs resumed after running out of memory, on another machine, or after their output was saved."""

import json
import os

import pytest
import torch

import model_slimming
from slim_utils.cli.app import run_cli
from slim_utils.layerwise.layer_forward import LayerForward
from slim_utils.layerwise.resume import LayerStore
from slim_utils.output import run_record
from slim_utils.pruning_config import PruningConfig
from tests.integration import finetuning
from train_utils import model_weights


@pytest.fixture
def prune(checkpoint, text_file, tmp_path):
    """Function that prunes the checkpoint into ``tmp_path / out`` with more flags."""

    def run(*more):
        argv = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.4]
        argv += ["--device", "cpu", "--eval_datasets", text_file, "--eval_seqlens", 16, "--save_dir", tmp_path / "out"]
        model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, [*argv, *more]))))
        return json.loads((tmp_path / "out" / "run.json").read_text())

    return run


def full(*args):
    raise torch.OutOfMemoryError("full")


def stop(*args):
    raise KeyboardInterrupt


def test_model_slimming_resumed_after_out_of_memory_uses_smaller_batches(prune, tmp_path, monkeypatch, capsys):
    run = LayerForward._run

    def limited(self, batch):
        if self.layer.self_attn.layer_idx == 2 or len(batch) > 8:
            full()
        return run(self, batch)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(LayerForward, "_run", limited)
        run_cli(lambda: prune(), "model_slimming.py", "lower --batch_samples", "--save_dir", "; --resume goes on")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "model_slimming.py: error: out of GPU memory; lower --batch_samples; --resume goes on"
    store = LayerStore(tmp_path / "out")
    assert len(list(store.folder.glob("layer_*"))) == 2
    record = prune("--resume", "--batch_samples", 4)
    assert [layer["batch_samples"] for layer in record["layers"]] == [8, 8, 1, 1]
    assert [layer["cache_dev"] for layer in record["layers"]] == ["cpu"] * 4
    assert not store.exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_model_slimming_with_a_failing_evaluation_reports_the_saved_output(prune, tmp_path, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(model_slimming, "evaluate_pruned", fail)
        run_cli(lambda: prune(), "model_slimming.py", resume_advice="; RESUME")
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'out'} is saved, but not evaluated; --resume evaluates it" in line
    assert "nothing was saved" not in line and "RESUME" not in line
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert prune("--resume", "--skip_evaluate")["arguments"]["skip_evaluate"]


def test_model_finetune_with_a_failing_evaluation_reports_the_saved_output(slim, argv, tmp_path, monkeypatch):
    evaluate, calls = model_weights.evaluate, []

    def limited(*args):
        calls.append(args)
        return evaluate(*args) if len(calls) == 1 else full()

    monkeypatch.setattr(model_weights, "evaluate", limited)
    with pytest.raises(torch.OutOfMemoryError) as error:
        finetuning.main(argv(slim / "pruned_weights", "--use_lora", "true", "--max_steps", 1))
    assert error.value.__notes__ == [f"{tmp_path / 'out'} is saved; only its perplexities are missing in run.json"]
    assert (tmp_path / "out" / "lora_fused_model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_model_slimming_resumed_twice_adds_up_its_seconds(prune, tmp_path, monkeypatch):
    store = LayerStore(tmp_path / "out")
    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(model_slimming, "write_output", stop)
            prune("--resume")
        # Make the last layer seem to have taken an hour.
        settings, last_layer = store.folder / "settings.json", store.folder / "layer_0003.safetensors"
        os.utime(last_layer, (settings.stat().st_mtime + 3600,) * 2)
    assert 7200 <= prune("--resume")["pruning_seconds"] < 7260


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"versions": {"torch": "1.0"}}, "torch was 2"),
        ({"versions": {"transformers": "1.0"}}, "transformers was 5"),
        ({"hardware": {"device": "B200"}}, "GPU was cpu, is B200"),
    ],
)
def test_resume_with_other_versions_or_another_gpu_warns(changes, warned, tmp_path, monkeypatch, caplog):
    config = PruningConfig(device=torch.device("cpu"))
    LayerStore(tmp_path / "out").open({"a": 1}, False, run_record.rounding_settings(config))
    environment = run_record.environment

    def changed(device):
        original = environment(device)
        return original | {part: original[part] | values for part, values in changes.items()}

    monkeypatch.setattr(run_record, "environment", changed)
    LayerStore(tmp_path / "out").open({"a": 1}, True, run_record.rounding_settings(config))
    assert f"--resume: {warned}" in caplog.text and "agree with those of one run up to rounding" in caplog.text


def test_open_store_on_another_gpu_has_the_same_settings_unlike_another_device_type(tmp_path, monkeypatch):
    """Compares the settings that identify a run."""
    opened = []
    monkeypatch.setattr(model_slimming, "fingerprint", lambda *args: "model")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(LayerStore, "open", lambda self, settings, *rest: opened.append(settings))
    host = type("Host", (), {"sampled_tensors": lambda self: (), "model": type("Model", (), {"config": None})})()
    data = type("Data", (), {"sha256": "text"})()
    for name in ("cuda:0", "cuda:3", "cpu"):
        config = PruningConfig(save_dir=str(tmp_path / "out"), device=torch.device(name))
        inputs = type("Inputs", (), {"config": config, "data": data, "table": None})()
        model_slimming.open_store(inputs, host, model_slimming.ProcessGroup())
    assert opened[0] == opened[1] != opened[2]
