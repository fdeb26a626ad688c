"""Runs that are cut off, by kill -9 at any instant or by a full disk, and go on to the same bytes."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import model_slimming
from slim_utils.allocation.planner import plans_of
from slim_utils.common.errors import UserError
from slim_utils.common.output_folder import clear_leftovers
from slim_utils.families import find_family
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import LayerStore, changed_parameters, fingerprint
from slim_utils.layerwise.settings import PruningSettings
from tests.conftest import ALL_TINY, make_tiny
from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RATIOS = [0.2, 0.35, 0.0, 0.6]

# Imports once, and forks a process for every try, before torch has any threads of its own.
KILLER = """
import os, random, signal, sys, time
import model_slimming
from slim_utils.cli.app import setup_logging
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

def attempt(words, seconds):
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        setup_logging()
        try:
            model_slimming.main(model_slimming.build_parser().parse_args(words))
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

kills, out, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
generator, done, killed = random.Random(0), 0, 0
start = time.perf_counter()
assert attempt([*words, "--save_dir", f"{out}-whole"], 60) == 0
whole = time.perf_counter() - start
while killed < kills or not done:
    seconds = generator.uniform(0.1, 1) * whole if killed < kills else 60
    code = attempt([*words, "--resume", "--save_dir", f"{out}-{done}"], seconds)
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
def words(checkpoint, text_file) -> list[str]:
    """A run of a second, without --save_dir."""
    flags = ["--num_samples", 16, "--seqlen", 32, "--sparsity", 0.4, "--save_pruned_weights", "--skip_evaluate"]
    return list(map(str, [checkpoint, "--data_file", text_file, "--device", "cpu", *flags]))


def main(*arguments: object) -> None:
    """Run the script in this process."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all that a run writes but its times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("more", [[], ["--stream", "--sink_windows", "20"]])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_instant(words, more, kills, tmp_path):
    process = run_python("-c", KILLER, kills, tmp_path / "out", *words, *more)
    assert process.returncode == 0, process.stderr
    killed, done = map(int, process.stdout.split())
    assert killed >= kills and done
    expected = contents(tmp_path / "out-whole")
    assert "pruned_weights/config.json" in expected
    for number in range(done):
        assert contents(tmp_path / f"out-{number}") == expected
        # A run that was killed after its last act leaves its store, and nothing else.
        assert (tmp_path / f"out-{number}" / "run.json").is_file()
        assert not list(tmp_path.glob(f".out-{number}.partial-*"))


@pytest.mark.parametrize("variant", ["gqa", "olmo2", "mixtral", "qwen3_moe", "opt"])
@pytest.mark.parametrize("finished", [1, 2])
def test_every_family_goes_on_to_the_same_bytes(variant, finished, samples, tmp_path):
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
def test_the_store_holds_all_that_the_walk_changes(variant, samples):
    model, dense = make_tiny(variant), make_tiny(variant)
    family = find_family(model.config)
    settings = PruningSettings(CPU, CPU)
    prune_layers(model, family, samples, plans_of(model, [0.5] * 4, settings), settings)
    for layer, before in zip(family.decoder_layers(model), family.decoder_layers(dense), strict=True):
        stored = changed_parameters(layer, family)
        for name, parameter in layer.named_parameters():
            assert name in stored or torch.equal(parameter, before.get_parameter(name))


def test_a_cut_off_run_is_not_begun_anew_silently(words, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model_slimming, "write_output", stop)
        main(*words, "--save_dir", out)
    store = LayerStore(out)
    assert len(list(store.folder.glob("layer_*.safetensors"))) == 4
    with pytest.raises(UserError, match="a run was interrupted; --resume continues it, --overwrite starts anew"):
        main(*words, "--save_dir", out)
    with pytest.raises(UserError, match=r"not the same run: --percdamp was 0\.01, is 0\.1; to start"):
        main(*words, "--percdamp", 0.1, "--resume", "--save_dir", out)
    with pytest.raises(UserError, match=r"not the same run: --seed was 0, is 1; calibration was \w+, is \w+"):
        main(*words, "--seed", 1, "--resume", "--save_dir", out)
    main(*words, "--resume", "--save_dir", out)
    assert not store.exists()
    main(*words, "--save_dir", tmp_path / "other")
    assert contents(out) == contents(tmp_path / "other")
    layers = json.loads((out / "run.json").read_text())["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]


def test_overwrite_discards_a_cut_off_run(words, tmp_path):
    store = LayerStore(tmp_path / "out")
    store.open({"--percdamp": 7}, False)
    with pytest.raises(UserError, match=r"not the same run: .* to start anew pass --overwrite, without --resume"):
        main(*words, "--overwrite", "--resume", "--save_dir", tmp_path / "out")
    main(*words, "--overwrite", "--save_dir", tmp_path / "out")
    assert not store.exists()
    with pytest.raises(UserError, match="--resume needs the --save_dir"):
        main(*words, "--resume")


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_main_beside_a_live_run_names_it_and_keeps_its_layers(words, more, tmp_path, lock_holder):
    store = LayerStore(tmp_path / "out")
    store.open({}, False)
    (store.folder / "layer_0000.safetensors").write_bytes(b"of the live run")
    process = lock_holder(tmp_path / "out")
    with pytest.raises(UserError, match=f"--save_dir .*out: process {process.pid} on .* is writing it"):
        main(*words, *more, "--save_dir", tmp_path / "out")
    assert (store.folder / "layer_0000.safetensors").read_bytes() == b"of the live run"


def test_layers_of_an_unknown_run_are_not_taken(tmp_path):
    store = LayerStore(tmp_path / "out")
    store.open({"a": 1}, False)
    (store.folder / "layer_0000.safetensors").write_bytes(b"of another")
    (store.folder / "settings.json").unlink()
    store.open({"a": 1}, True)
    assert [path.name for path in store.folder.iterdir()] == ["settings.json"]


def test_cut_off_while_it_is_evaluated(words, text_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = [word for word in words if word != "--skip_evaluate"]
    words += ["--eval_datasets", str(text_file), "--eval_seqlens", "16", "--save_dir", str(out)]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model_slimming, "evaluate_pruned", stop)
        main(*words)
    assert (out / "run.json").is_file()
    before = contents(out)
    with pytest.raises(UserError, match="a run was interrupted; --resume continues it"):
        main(*words)
    main(*words, "--resume")
    assert json.loads((out / "run.json").read_text())["perplexity"]
    after = contents(out)
    assert {name for name in after if after[name] != before.get(name)} == {"pruned_weights/README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_was_put_aside_comes_back(tmp_path):
    target, aside = tmp_path / "out[1]", tmp_path / ".out[1].partial-x-old"
    aside.mkdir()
    (aside / "run.json").write_text("{}")
    (tmp_path / ".out[1].partial-x").mkdir()
    clear_leftovers(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]
    assert (target / "run.json").is_file()


def test_another_model_has_another_fingerprint():
    def printed(model):
        return fingerprint(model.config, model.named_parameters())

    model = make_tiny("gqa")
    same = printed(make_tiny("gqa"))
    assert printed(model) == same
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.001)
    assert printed(model) != same
    assert printed(make_tiny("gqa", rms_norm_eps=1e-3)) != same


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 150 KiB, and what makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=10m", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_a_full_disk_leaves_a_run_that_goes_on(words, more, small_disk, tmp_path):
    disk, make_room = small_disk
    words = [*words, *more]
    command = ["model_slimming.py", *words, "--resume", "--save_dir", disk / "out"]
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
    main(*words, "--save_dir", tmp_path / "other")
    assert contents(disk / "out") == contents(tmp_path / "other")
    shutil.rmtree(disk / "out")
    assert list(disk.iterdir()) == []
