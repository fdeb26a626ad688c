"""Runs that go on after the device's memory was full, on another machine, or after their output was saved."""

import json
import os

import pytest
import torch

import model_finetune
import model_slimming
from slim_utils.cli.app import run_cli
from slim_utils.layerwise.layer_forward import LayerForward
from slim_utils.layerwise.resume import LayerStore
from slim_utils.output import run_record
from slim_utils.pruning_config import PruningConfig
from tests.integration import finetuning


@pytest.fixture
def prune(checkpoint, text_file, tmp_path):
    """Prunes the checkpoint into ``tmp_path / out``, with further flags."""

    def run(*more):
        words = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.4]
        words += ["--device", "cpu", "--eval_datasets", text_file, "--eval_seqlens", 16, "--save_dir", tmp_path / "out"]
        model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, [*words, *more]))))
        return json.loads((tmp_path / "out" / "run.json").read_text())

    return run


def full(*args):
    raise torch.OutOfMemoryError("full")


def stop(*args):
    raise KeyboardInterrupt


def test_resume_after_full_memory_with_smaller_batches(prune, tmp_path, monkeypatch, capsys):
    """As the message advises."""
    run, fits = LayerForward._run, [8]

    def limited(self, batch):
        if self.layer.self_attn.layer_idx == 2 or len(batch) > fits[0]:
            full()
        return run(self, batch)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(LayerForward, "_run", limited)
        run_cli(lambda: prune(), "model_slimming.py", "lower --batch_samples", "--save_dir", "; --resume goes on")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "model_slimming.py: error: out of GPU memory; lower --batch_samples; --resume goes on"
    store = LayerStore(tmp_path / "out")
    assert len(list(store.folder.glob("layer_*"))) == 2
    record = prune("--resume", "--batch_samples", 4)
    assert [layer["batch_samples"] for layer in record["layers"]] == [8, 8, 1, 1]
    assert [layer["cache_dev"] for layer in record["layers"]] == ["cpu"] * 4
    assert not store.exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_evaluation_that_fails_says_that_the_output_is_saved(prune, tmp_path, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(model_slimming, "evaluate_pruned", fail)
        run_cli(lambda: prune(), "model_slimming.py", resume_advice="; RESUME")
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'out'} is saved, but not evaluated; --resume evaluates it" in said
    assert "nothing was saved" not in said and "RESUME" not in said
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert prune("--resume", "--skip_evaluate")["arguments"]["skip_evaluate"]


def test_finetuning_whose_evaluation_fails_is_saved(slim, words, tmp_path, monkeypatch):
    evaluate, calls = model_finetune.evaluate, []

    def limited(*args):
        calls.append(args)
        return evaluate(*args) if len(calls) == 1 else full()

    monkeypatch.setattr(model_finetune, "evaluate", limited)
    with pytest.raises(torch.OutOfMemoryError) as error:
        finetuning.main(words(slim / "pruned_weights", "--use_lora", "true", "--max_steps", 1))
    assert error.value.__notes__ == [f"{tmp_path / 'out'} is saved; only its perplexities are missing in run.json"]
    assert (tmp_path / "out" / "lora_fused_model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_resume_adds_up_the_seconds_of_all_processes(prune, tmp_path, monkeypatch):
    store = LayerStore(tmp_path / "out")
    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(model_slimming, "write_output", stop)
            prune("--resume")
        # As if the last layer had taken an hour.
        begun, last = store.folder / "settings.json", store.folder / "layer_0003.safetensors"
        os.utime(last, (begun.stat().st_mtime + 3600,) * 2)
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
        found = environment(device)
        return found | {part: found[part] | values for part, values in changes.items()}

    monkeypatch.setattr(run_record, "environment", changed)
    LayerStore(tmp_path / "out").open({"a": 1}, True, run_record.rounding_settings(config))
    assert f"--resume: {warned}" in caplog.text and "agree with those of one run up to rounding" in caplog.text


def test_resume_on_another_kind_of_device_is_refused_on_another_gpu_it_is_not(tmp_path, monkeypatch):
    """The settings of the run that are compared."""
    kept = []
    monkeypatch.setattr(model_slimming, "fingerprint", lambda *args: "model")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(LayerStore, "open", lambda self, settings, *rest: kept.append(settings))
    host = type("Host", (), {"sampled_tensors": lambda self: (), "model": type("Model", (), {"config": None})})()
    data = type("Data", (), {"sha256": "text"})()
    for name in ("cuda:0", "cuda:3", "cpu"):
        config = PruningConfig(save_dir=str(tmp_path / "out"), device=torch.device(name))
        model_slimming.open_store(config, host, data, model_slimming.ProcessGroup())
    assert kept[0] == kept[1] != kept[2]
