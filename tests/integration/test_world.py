"""Pruning with several processes: the units and weights of a single process, and a one-line error if one dies."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slim_utils.common.errors import ProcessLostError, UserError
from slim_utils.layerwise import distributed
from slim_utils.layerwise.distributed import ProcessGroup
from tests.processes import run_python, run_ranks
from tests.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parents[2]

# The script with rank 1 killed in its second layer.
DYING = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
from slim_utils.layerwise.layer_forward import LayerForward
finish, calls = LayerForward.finish_attention, []
def die(self):
    calls.append(1)
    # Called twice per layer, for the two window lengths.
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self)
LayerForward.finish_attention = die
sys.argv[0] = "model_slimming.py"
runpy.run_path("model_slimming.py", run_name="__main__")
"""

# A run whose rank 1 fails, in a block that shares errors, before rank 0 waits for it.
SHARING = """
import os, torch
from slim_utils.cli.app import run_cli
from slim_utils.common.errors import UserError
from slim_utils.layerwise.distributed import ProcessGroup
def main():
    processes = ProcessGroup.init(torch.device("cpu"))
    with processes.shared_errors():
        if processes.rank:
            {failure}
        print(processes.all_gather(processes.rank))
        processes.all_gather(None)
    processes.destroy()
run_cli(main, "prog")
"""


def run(processes: int, *argv: object) -> subprocess.CompletedProcess:
    """Run the script in ``processes`` processes."""
    return run_ranks(processes, "model_slimming.py", *argv)


@pytest.fixture
def argv(text_file) -> list:
    """Flags, without model and output, of a well-conditioned run, so that the order of summation does not matter."""
    flags = ["--num_samples", 62, "--seqlen", 32, "--sparsity", 0.4, "--percdamp", 0.1, "--sink_windows", 40]
    return ["--data_file", text_file, "--device", "cpu", "--skip_evaluate", *flags]


@pytest.mark.parametrize("name", ["gqa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mixtral"))])
def test_model_slimming_on_several_processes_gives_the_weights_of_one(name, argv, tokenizer, tmp_path):
    make_tiny(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for processes in (1, 2, 4):
        process = run(processes, tmp_path / "model", *argv, "--save_dir", tmp_path / str(processes))
        assert process.returncode == 0, process.stderr
        assert process.stderr.count(" INFO layer ") == 4
    expected = (tmp_path / "1" / "pruning.json").read_text()
    weights = load_file(tmp_path / "1" / "model.safetensors")
    for processes in ("2", "4"):
        assert (tmp_path / processes / "pruning.json").read_text() == expected
        for key, tensor in load_file(tmp_path / processes / "model.safetensors").items():
            assert (tensor - weights[key]).abs().max() <= 1e-5 * weights[key].abs().max(), key
        errors = [
            [layer["mlp"]["error_after_compensation"] for layer in json.loads(path.read_text())["layers"]]
            for path in (tmp_path / "1" / "run.json", tmp_path / processes / "run.json")
        ]
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_model_slimming_on_two_processes_with_wrong_input_prints_one_error(checkpoint, argv, tmp_path):
    process = run(2, checkpoint, *argv, "--num_samples", 1, "--save_dir", tmp_path / "out")
    assert process.returncode != 0
    assert process.stderr.count("model_slimming.py: error: --num_samples 1: fewer than the 2 processes") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_model_slimming_after_a_killed_process_ends_and_can_be_resumed(launched, checkpoint, argv, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    arguments = [checkpoint, *argv, "--save_dir", tmp_path / "out"]
    if launched:
        # The launcher polls slowly, so that it does not end rank 0 before rank 0 prints its error.
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--monitor_interval=5"]
        process = run_python(*launcher, "--rdzv_endpoint=localhost:0", script, *arguments)
    else:
        process = run_ranks(2, script, *arguments)
    assert process.returncode != 0
    assert process.stderr.count("model_slimming.py: error: rank 0: lost contact with another process") == 1, (
        process.stderr
    )
    assert not (tmp_path / "out").exists()
    process = run(2, *arguments, "--resume")
    assert process.returncode == 0, process.stderr
    # The first layer is not pruned again.
    assert process.stderr.count(" INFO layer ") == 3
    assert run(2, checkpoint, *argv, "--save_dir", tmp_path / "whole").returncode == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        ("pass", 0, None),
        ("raise UserError('--flag x')", 2, "prog: error: --flag x"),
        ("raise torch.OutOfMemoryError('full')", 1, "prog: error: out of GPU memory; use --device cpu"),
        # As for the context on a GPU that other programs fill.
        (
            "raise torch.AcceleratorError('CUDA error: out of memory\\nAdvice')",
            1,
            "prog: error: out of GPU memory (CUDA error: out of memory); use --device cpu",
        ),
        ("raise ValueError('unexpected')", 1, "ValueError: unexpected"),
    ],
)
def test_shared_errors_of_one_process_end_all_with_one_message(failure, code, line):
    process = run_ranks(2, "-c", SHARING.format(failure=failure))
    assert process.returncode == code
    assert process.stdout == ("[0, 1]\n[0, 1]\n" if line is None else "")
    reports = [text for text in process.stderr.splitlines() if "rror: " in text]
    assert reports == ([] if line is None else [line])
    assert process.stderr.count("Traceback") == (1 if "ValueError" in failure else 0), process.stderr


@pytest.mark.parametrize(("device", "current"), [("cuda", []), ("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_process_group_init_makes_the_gpu_of_a_number_current(device, current, monkeypatch):
    """Torch refuses one without, the device of processes whose launcher sets no local rank."""
    chosen = []

    def set_device(device):
        torch.cuda._utils._get_device_index(device)
        chosen.append(str(device))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(distributed.distributed, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(distributed.distributed, "get_rank", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ProcessGroup.init(torch.device(device)) == ProcessGroup(1, 2)
    assert chosen == current


def test_shard_of_all_ranks_covers_all_samples(samples):
    shares = [ProcessGroup(rank, 3).shard(samples) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 2]
    assert torch.equal(torch.cat(shares), samples)
    with pytest.raises(UserError, match="--num_samples 8: fewer than the 9 processes"):
        ProcessGroup(0, 9).shard(samples)


@pytest.mark.parametrize(
    "collective",
    [
        lambda processes: processes.all_reduce(torch.zeros(1)),
        lambda processes: processes.all_gather(None),
        lambda processes: processes.barrier(),
        lambda processes: processes.on_main(lambda: 1, [torch.zeros(1)]),
        lambda processes: processes.all_true(True, torch.device("cpu")),
    ],
)
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "^full$"),
        (torch.AcceleratorError("an illegal access", 700), torch.AcceleratorError, "an illegal access"),
        (
            RuntimeError("gloo: closed by peer\nat"),
            ProcessLostError,
            r"lost contact with another process.*: gloo: closed by peer",
        ),
    ],
)
def test_collectives_that_fail_keep_the_cause(collective, error, kind, message, monkeypatch):
    def fail(*args, **flags):
        raise error

    for name in ("all_gather_object", "all_reduce", "barrier", "broadcast", "broadcast_object_list"):
        monkeypatch.setattr(distributed.distributed, name, fail)
    with pytest.raises(kind, match=message):
        collective(ProcessGroup(0, 2))
