"""Runs interrupted by kill -9 at any time or by a full disk, resumed to the same bytes."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import model_slimming
from slim_utils.allocation.planner import plans_of
from slim_utils.common.errors import UserError
from slim_utils.common.output_folder import clear_leftovers
from slim_utils.families import find_family
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import LayerStore, changed_parameters, fingerprint, setting_changes
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.pruning_config import Effect, PruningConfig
from tests.processes import run_python
from tests.tiny_models import ALL_TINY, make_tiny

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RATIOS = [0.2, 0.35, 0.0, 0.6]

# Imports once and forks a process for every attempt, before torch starts any threads.
KILLER = """
import os, random, signal, sys, time
import model_slimming
from slim_utils.cli.app import setup_logging
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

def attempt(argv, seconds):
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        setup_logging()
        try:
            model_slimming.main(model_slimming.build_parser().parse_args(argv))
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

kills, out, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
generator, done, killed = random.Random(0), 0, 0
start = time.perf_counter()
assert attempt([*argv, "--save_dir", f"{out}-whole"], 60) == 0
whole = time.perf_counter() - start
while killed < kills or not done:
    seconds = generator.uniform(0.1, 1) * whole if killed < kills else 60
    code = attempt([*argv, "--resume", "--save_dir", f"{out}-{done}"], seconds)
    if code == -signal.SIGKILL:
        killed += 1
        if os.path.exists(f"{out}-{done}"):
            done += 1
    else:
        assert code == 0, code
        done += 1
print(killed, done)
"""


@pytest.fixture
def argv(checkpoint, text_file) -> list[str]:
    """Arguments of a short run, without --save_dir."""
    flags = ["--num_samples", 16, "--seqlen", 32, "--sparsity", 0.4, "--save_pruned_weights", "--skip_evaluate"]
    return list(map(str, [checkpoint, "--data_file", text_file, "--device", "cpu", *flags]))


def main(*arguments: object) -> None:
    """Run the script in this process."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files of a run except run.json, which has times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("more", [pytest.param([], marks=pytest.mark.slow), ["--stream", "--sink_windows", "20"]])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_model_slimming_killed_at_any_time_resumes_to_the_same_bytes(argv, more, kills, tmp_path):
    process = run_python("-c", KILLER, kills, tmp_path / "out", *argv, *more)
    assert process.returncode == 0, process.stderr
    killed, done = map(int, process.stdout.split())
    assert killed >= kills and done
    expected = contents(tmp_path / "out-whole")
    assert "pruned_weights/config.json" in expected
    for number in range(done):
        assert contents(tmp_path / f"out-{number}") == expected
        # A run that was killed after writing its output leaves only its store.
        assert (tmp_path / f"out-{number}" / "run.json").is_file()
        assert not list(tmp_path.glob(f".out-{number}.partial-*"))


@pytest.mark.parametrize("variant", ["gqa", "olmo2", "mixtral", "qwen3_moe", "opt"])
@pytest.mark.parametrize("finished", [1, 2])
def test_prune_layers_resumed_gives_the_same_bytes_for_every_family(variant, finished, samples, tmp_path):
    settings = PruningSettings(CPU, CPU)
    whole, first, second = (make_tiny(variant) for _ in range(3))
    family = find_family(whole.config)
    plans = plans_of(whole, RATIOS, settings)
    expected, reports = prune_layers(whole, family, samples, plans, settings)
    store = LayerStore(tmp_path / "out")
    store.open({}, False)
    prune_layers(first, family, samples, plans, settings, store)
    for path in sorted(store.folder.glob("layer_*"))[finished:]:
        path.unlink()
    again = LayerStore(tmp_path / "out")
    again.open({}, True)
    masks, resumed = prune_layers(second, family, samples, plans, settings, again)
    assert masks == expected
    for got, report in zip(resumed, reports, strict=True):
        assert (got.layer, got.mask, got.attention, got.mlp) == (
            report.layer,
            report.mask,
            report.attention,
            report.mlp,
        )
    for name, parameter in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], parameter), name


@pytest.mark.parametrize("variant", ALL_TINY)
def test_changed_parameters_are_all_that_prune_layers_changes(variant, samples):
    model, dense = make_tiny(variant), make_tiny(variant)
    family = find_family(model.config)
    settings = PruningSettings(CPU, CPU)
    prune_layers(model, family, samples, plans_of(model, [0.5] * 4, settings), settings)
    for layer, before in zip(family.decoder_layers(model), family.decoder_layers(dense), strict=True):
        stored = changed_parameters(layer, family)
        for name, parameter in layer.named_parameters():
            assert name in stored or torch.equal(parameter, before.get_parameter(name))


def test_model_slimming_after_an_interrupted_run_needs_resume_or_overwrite(argv, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model_slimming, "write_output", stop)
        main(*argv, "--save_dir", out)
    store = LayerStore(out)
    assert len(list(store.folder.glob("layer_*.safetensors"))) == 4
    with pytest.raises(UserError, match="a run was interrupted; --resume continues it, --overwrite starts anew"):
        main(*argv, "--save_dir", out)
    with pytest.raises(UserError, match=r"not the same run: --percdamp was 0\.01, is 0\.1; to start"):
        main(*argv, "--percdamp", 0.1, "--resume", "--save_dir", out)
    with pytest.raises(UserError, match=r"not the same run: --seed was 0, is 1; calibration was \w+, is \w+"):
        main(*argv, "--seed", 1, "--resume", "--save_dir", out)
    main(*argv, "--resume", "--save_dir", out)
    assert not store.exists()
    main(*argv, "--save_dir", tmp_path / "other")
    assert contents(out) == contents(tmp_path / "other")
    layers = json.loads((out / "run.json").read_text())["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]


def test_model_slimming_with_overwrite_discards_an_interrupted_run(argv, tmp_path):
    store = LayerStore(tmp_path / "out")
    store.open({"--percdamp": 7}, False)
    with pytest.raises(UserError, match=r"not the same run: .* to start anew pass --overwrite, without --resume"):
        main(*argv, "--overwrite", "--resume", "--save_dir", tmp_path / "out")
    main(*argv, "--overwrite", "--save_dir", tmp_path / "out")
    assert not store.exists()
    with pytest.raises(UserError, match="--resume needs the --save_dir"):
        main(*argv, "--resume")


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_model_slimming_beside_a_live_run_names_it_and_keeps_its_layers(argv, more, tmp_path, lock_holder):
    store = LayerStore(tmp_path / "out")
    store.open({}, False)
    (store.folder / "layer_0000.safetensors").write_bytes(b"of the live run")
    process = lock_holder(tmp_path / "out")
    with pytest.raises(UserError, match=f"--save_dir .*out: process {process.pid} on .* is writing it"):
        main(*argv, *more, "--save_dir", tmp_path / "out")
    assert (store.folder / "layer_0000.safetensors").read_bytes() == b"of the live run"


def test_settings_from_before_a_flag_was_added_are_those_of_its_default():
    flags = PruningConfig().flags(Effect.VALUE)
    added = ("--target_macs", "--target_memory", "--target_latency", "--latency_of", "--at_context", "--at_batch")
    assert setting_changes({name: value for name, value in flags.items() if name not in added}, flags) == []


def test_layer_store_with_a_layer_of_another_version_is_refused(tmp_path):
    model = make_tiny("gqa")
    family, layer = find_family(model.config), model.model.layers[0]
    store = LayerStore(tmp_path / "out")
    store.open({}, False)
    path = store.folder / "layer_0000.safetensors"
    parameters = {name: value.detach() for name, value in changed_parameters(layer, family).items()}
    for report in ({}, {"layer": 0, "seconds": 1.0}, {"mask": {"shape": {"rows": 1}}}):
        save_file(parameters, path, metadata={"report": json.dumps(report)})
        with pytest.raises(UserError, match=r"--resume: .*layer_0000.safetensors is of another version of the suite"):
            store.restore(0, layer, family)


def test_layer_store_without_settings_discards_its_layers(tmp_path):
    store = LayerStore(tmp_path / "out")
    store.open({"a": 1}, False)
    (store.folder / "layer_0000.safetensors").write_bytes(b"of another")
    (store.folder / "settings.json").unlink()
    store.open({"a": 1}, True)
    assert [path.name for path in store.folder.iterdir()] == ["settings.json"]


def test_model_slimming_interrupted_while_evaluating_can_be_resumed(argv, text_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = [argument for argument in argv if argument != "--skip_evaluate"]
    argv += ["--eval_datasets", str(text_file), "--eval_seqlens", "16", "--save_dir", str(out)]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model_slimming, "evaluate_pruned", stop)
        main(*argv)
    assert (out / "run.json").is_file()
    before = contents(out)
    with pytest.raises(UserError, match="a run was interrupted; --resume continues it"):
        main(*argv)
    main(*argv, "--resume")
    assert json.loads((out / "run.json").read_text())["perplexity"]
    after = contents(out)
    assert {name for name in after if after[name] != before.get(name)} == {"pruned_weights/README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_clear_leftovers_restores_a_renamed_output(tmp_path):
    target, aside = tmp_path / "out[1]", tmp_path / ".out[1].partial-x-old"
    aside.mkdir()
    (aside / "run.json").write_text("{}")
    (tmp_path / ".out[1].partial-x").mkdir()
    clear_leftovers(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]
    assert (target / "run.json").is_file()


def test_fingerprint_of_another_model_differs():
    def model_fingerprint(model):
        return fingerprint(model.config, model.named_parameters())

    model = make_tiny("gqa")
    expected = model_fingerprint(make_tiny("gqa"))
    assert model_fingerprint(model) == expected
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.001)
    assert model_fingerprint(model) != expected
    assert model_fingerprint(make_tiny("gqa", rms_norm_eps=1e-3)) != expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 150 KiB, and a function that enlarges it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=10m", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_model_slimming_on_a_full_disk_can_be_resumed(argv, more, small_disk, tmp_path):
    disk, make_room = small_disk
    argv = [*argv, *more]
    command = ["model_slimming.py", *argv, "--resume", "--save_dir", disk / "out"]
    process = run_python(*command)
    assert process.returncode == 1, process.stderr
    error = process.stderr.splitlines()[-1]
    assert "the disk is full, nothing was saved" in error and "--resume with the same --save_dir continues" in error
    assert "Traceback" not in process.stderr
    assert [path.name for path in disk.iterdir()] == [".out.unfinished"]
    assert not list(disk.rglob("*.partial"))
    make_room()
    process = run_python(*command)
    assert process.returncode == 0, process.stderr
    main(*argv, "--save_dir", tmp_path / "other")
    assert contents(disk / "out") == contents(tmp_path / "other")
    shutil.rmtree(disk / "out")
    assert list(disk.iterdir()) == []
