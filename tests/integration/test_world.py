"""Several processes on one model: the same units and weights as one process, and one line when one of them dies."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slim_utils.common.errors import ProcessLostError, UserError
from slim_utils.layerwise import distributed
from slim_utils.layerwise.distributed import ProcessGroup
from tests.conftest import make_tiny
from tests.processes import run_python, run_ranks

ROOT = Path(__file__).resolve().parents[2]

# The script, in which the second process dies in its second layer.
DYING = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
from slim_utils.layerwise.layer_forward import LayerForward
finish, calls = LayerForward.finish_attention, []
def die(self):
    calls.append(1)
    # In the second layer: each has two lengths of windows.
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self)
LayerForward.finish_attention = die
sys.argv[0] = "model_slimming.py"
runpy.run_path("model_slimming.py", run_name="__main__")
"""


def run(processes: int, *words: object) -> subprocess.CompletedProcess:
    """The script in so many processes."""
    return run_ranks(processes, "model_slimming.py", *words)


@pytest.fixture
def words(text_file) -> list:
    """Flags of a well-conditioned run, so that the order of sums does not matter; without model and output."""
    flags = ["--num_samples", 62, "--seqlen", 32, "--sparsity", 0.4, "--percdamp", 0.1, "--sink_windows", 40]
    return ["--data_file", text_file, "--device", "cpu", "--skip_evaluate", *flags]


@pytest.mark.parametrize("name", ["gqa", "mixtral"])
def test_same_units_and_weights_as_one_process(name, words, tokenizer, tmp_path):
    make_tiny(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for processes in (1, 2, 4):
        process = run(processes, tmp_path / "model", *words, "--save_dir", tmp_path / str(processes))
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


def test_wrong_input_is_said_once(checkpoint, words, tmp_path):
    process = run(2, checkpoint, *words, "--num_samples", 1, "--save_dir", tmp_path / "out")
    assert process.returncode != 0
    assert process.stderr.count("model_slimming.py: error: --num_samples 1: fewer than the 2 processes") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_all_and_the_run_goes_on(launched, checkpoint, words, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    arguments = [checkpoint, *words, "--save_dir", tmp_path / "out"]
    if launched:
        # The launcher looks late, or it might end the first process before that one has spoken.
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
    assert run(2, checkpoint, *words, "--save_dir", tmp_path / "whole").returncode == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


def test_shares_are_all_samples(samples):
    shares = [ProcessGroup(rank, 3).shard(samples) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 2]
    assert torch.equal(torch.cat(shares), samples)
    with pytest.raises(UserError, match="--num_samples 8: fewer than the 9 processes"):
        ProcessGroup(0, 9).shard(samples)


@pytest.mark.parametrize(
    "collective",
    [
        lambda processes: processes.all_reduce(torch.zeros(1)),
        lambda processes: processes.barrier(),
        lambda processes: processes.on_main(lambda: 1, [torch.zeros(1)]),
        lambda processes: processes.all_true(True, torch.device("cpu")),
    ],
)
@pytest.mark.parametrize(
    ("error", "kind", "said"),
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
def test_collectives_keep_the_cause(collective, error, kind, said, monkeypatch):
    def fail(*args, **flags):
        raise error

    for name in ("all_reduce", "barrier", "broadcast", "broadcast_object_list"):
        monkeypatch.setattr(distributed.distributed, name, fail)
    with pytest.raises(kind, match=said):
        collective(ProcessGroup(0, 2))
