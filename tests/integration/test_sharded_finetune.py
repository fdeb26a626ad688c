"""``model_finetune.py`` on weights that two processes share, by ZeRO-3 or FSDP2."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.finetuning import run
from tests.integration.wide_llama import save_wide_llama
from tests.processes import run_ranks
from train_utils.sparse_trainer import SETTINGS_FILE

ROOT = Path(__file__).resolve().parents[2]
SHARDING = {
    "zero3": ["--deepspeed", "configs/deepspeed_zero3.json"],
    "fsdp2": ["--fsdp", "true", "--fsdp_config", "configs/fsdp2.json"],
}
TRAINED = {
    "lora": ["--train", "lora", "--peft_lora_dropout", 0],
    "block_weights": ["--train", "block_weights"],
    "all": ["--train", "all"],
}
SMALL_STEPS = ["--learning_rate", 1e-3]
MIB = 1 << 20
LAYERS, LAYER_MIB = 15, 28

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = [load_file(file) for file in folder.glob("model*.safetensors")]
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def model_folder(output: Path) -> Path:
    """The whole model in an output folder."""
    fused = output / "lora_fused_model"
    return fused if fused.is_dir() else output


@pytest.mark.parametrize("sharding", SHARDING)
@pytest.mark.parametrize(
    ("trained", "distilled"),
    [("lora", False), ("lora", True), ("block_weights", False), ("block_weights", True), ("all", True)],
)
def test_model_finetune_on_sharded_weights_equals_one_process(
    slim, argv, tmp_path, checkpoint, sharding, trained, distilled
):
    base = slim / "pruned_weights"
    flags = [*TRAINED[trained], *SMALL_STEPS, *(["--distill_from", checkpoint] if distilled else [])]
    one, two = tmp_path / "one", tmp_path / "two"
    process = run(argv(base, *flags, "--output_dir", one))
    assert process.returncode == 0, process.stderr
    half = ["--per_device_train_batch_size", 2, "--output_dir", two]
    process = run_ranks(2, "model_finetune.py", *argv(base, *flags, *half, *SHARDING[sharding]))
    assert process.returncode == 0, process.stderr

    expected, actual, before = weights(model_folder(one)), weights(model_folder(two)), weights(base)
    assert expected.keys() == actual.keys() == before.keys()
    assert all((actual[name] - value).abs().max() < 1e-4 for name, value in expected.items())
    assert max((actual[name] - value).abs().max() for name, value in before.items()) > 1e-3
    records = [json.loads((output / "run.json").read_text()) for output in (one, two)]
    for entries in zip(*(record["log"] for record in records), strict=True):
        for name in entries[0].keys() & {"loss", "eval_validation_loss", "eval_wikitext2_loss"}:
            assert entries[1][name] == pytest.approx(entries[0][name], rel=1e-3), entries
    for time in ("before", "after"):
        values = [[entry["perplexity"] for entry in record["perplexity"][time]] for record in records]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
    for key in ("parameters", "trained_parameters"):
        assert records[0][key] == records[1][key]
    names = [
        {path.name for path in model_folder(output).iterdir() if "safetensors" not in path.name}
        for output in (one, two)
    ]
    assert names[0] == names[1]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("sharding", SHARDING)
@pytest.mark.parametrize("trained", ["lora", "block_weights"])
def test_model_finetune_on_sharded_weights_resumed_equals_uninterrupted(slim, argv, tmp_path, sharding, trained):
    flags = [*TRAINED[trained], *SHARDING[sharding], "--save_strategy", "steps", "--save_steps", 2]
    command = ["model_finetune.py", *argv(slim / "pruned_weights", *flags)]
    process = run_ranks(2, *command)
    assert process.returncode == 0, process.stderr
    expected = weights(model_folder(tmp_path / "out"))
    settings = json.loads((tmp_path / "out" / "checkpoint-2" / SETTINGS_FILE).read_text())
    assert settings["--deepspeed"] == ("ZeRO stage 3" if sharding == "zero3" else False)
    for later in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(tmp_path / "out" / later, ignore_errors=True)
    process = run_ranks(2, *command, "--resume_from_checkpoint", "true")
    assert process.returncode == 0, process.stderr
    actual = weights(model_folder(tmp_path / "out"))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_model_finetune_with_fsdp2_in_host_memory_without_a_gpu_runs(slim, argv, tmp_path):
    flags = [*TRAINED["lora"], "--fsdp", "true", "--fsdp_config", '{"cpu_offload": true}', "--max_steps", 1]
    process = run_ranks(2, "model_finetune.py", *argv(slim / "pruned_weights", *flags))
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_model_finetune_with_wrong_targets_under_zero3_is_refused_before_the_weights_are_loaded(slim, argv):
    """The check builds the model without weights, which ZeRO-3 would divide while it is built."""
    flags = [*TRAINED["lora"], *SHARDING["zero3"], "--peft_target_modules", "nothing", "--check_only", "true"]
    process = run(argv(slim / "pruned_weights", *flags))
    assert process.returncode == 2
    assert "--peft_target_modules nothing: the model has no linear module nothing" in process.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory, tokenizer) -> Iterator[Path]:
    """A LLaMA of 420 MiB, nearly all of it in layers of 28 MiB."""
    path = tmp_path_factory.mktemp("models") / "large"
    save_wide_llama(path, tokenizer, LAYERS)
    yield path
    for shard in path.glob("*.safetensors"):
        shard.unlink()


# Prints the peak memory of a process, which leaves by os._exit unless it is the first one.
SCRIPT = r"""
import os, re, sys
from pathlib import Path
import model_finetune
from slim_utils.cli.app import setup_logging
from train_utils.finetune_args import parse_args
def report():
    print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024, flush=True)
leave = os._exit
os._exit = lambda status: (report(), leave(status))
setup_logging()
model_finetune.main(parse_args(sys.argv[1:]))
report()
"""


def peaks_mib(argv: list[str], folder: Path) -> list[float]:
    """Peak memory of each of two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Freed blocks are returned at once, so that the peak does not include memory cached by malloc.
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = []
    for rank in ("0", "1"):
        with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
            env = os.environ | group | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
            command = [sys.executable, "-c", SCRIPT, *argv]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))
    statuses = [process.wait() for process in processes]
    assert statuses == [0, 0], [(folder / f"{rank}.err").read_text() for rank in (0, 1)]
    return [float((folder / f"{rank}.out").read_text().splitlines()[-1]) for rank in (0, 1)]


def small_buffers(folder: Path) -> Path:
    """The configuration of ZeRO-3 without prefetch, which would run through all layers of so small a model."""
    config = json.loads((ROOT / "configs/deepspeed_zero3.json").read_text())
    config["zero_optimization"] |= {
        "reduce_bucket_size": 1e6,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 1e7,
        "stage3_max_reuse_distance": 0,
    }
    path = folder / "zero3.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("sharding", SHARDING)
def test_model_finetune_on_sharded_weights_peaks_below_a_whole_copy(
    large_checkpoint, checkpoint, text_file, argv, tmp_path, sharding
):
    short = tmp_path / "short.txt"
    short.write_text(" ".join(text_file.read_text().split()[:200]))
    peaks = {}
    # The same run on a tiny model gives the memory of the interpreter and its libraries.
    for name, model in (("tiny", checkpoint), ("large", large_checkpoint)):
        folder = tmp_path / name
        folder.mkdir()
        flags = [*TRAINED["lora"], *SHARDING[sharding], "--max_steps", 2, "--eval_strategy", "no", "--max_length", 16]
        if sharding == "zero3":
            flags += ["--deepspeed", small_buffers(folder)]
        flags += ["--distill_from", model, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1]
        flags += ["--extra_val_set", short, "--output_dir", folder / "out"]
        peaks[name] = peaks_mib(argv(model, *flags), folder)
    growths = [large - tiny for large, tiny in zip(peaks["large"], peaks["tiny"], strict=True)]
    # Half of the student and half of the teacher, and less than the other half of either.
    assert all(growth < 1.4 * LAYERS * LAYER_MIB for growth in growths), peaks
