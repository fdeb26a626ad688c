"""``--stream`` on a model that is larger than the memory limit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.wide_llama import save_wide_llama

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
LAYERS, LAYER_MIB, LIMIT_MIB = 30, 28, 640
# In addition to three layers: activations, and the solve of one map (three copies of its weights in fp64, the Hessian
# and its inverse).
ALLOWANCE_MIB = 30

SCRIPT = r"""
import re, sys
from pathlib import Path
import model_slimming
from slim_utils.cli.app import setup_logging
setup_logging()
model_slimming.main(model_slimming.build_parser().parse_args(sys.argv[1:]))
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory, tokenizer) -> Iterator[Path]:
    """A LLaMA of 840 MiB with wide layers, whose Hessians are small in comparison."""
    path = tmp_path_factory.mktemp("models") / "large"
    model = save_wide_llama(path, tokenizer, LAYERS)
    assert sum(parameter.nbytes for parameter in model.model.layers.parameters()) > LIMIT_MIB * MIB
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert round(layer / MIB) == LAYER_MIB
    del model
    yield path
    for shard in path.glob("*.safetensors"):
        shard.unlink()


@contextmanager
def memory_limit(mib: int) -> Iterator[str]:
    """File of a new control group with a memory limit; a process joins by writing its id."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"slimgpt-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(mib * MIB))
            break
        except OSError:
            if group.is_dir():
                group.rmdir()
    else:
        pytest.skip("needs the right to limit memory by a control group")
    try:
        yield str(group / "cgroup.procs")
    finally:
        group.rmdir()


def run(checkpoint: Path, text_file: Path, *flags: object, procs: str | None = None) -> subprocess.CompletedProcess:
    """Prune 25 % and evaluate on a short text, in a new process."""
    short = checkpoint.parent / "short.txt"
    short.write_text(" ".join(text_file.read_text().split()[:500]))
    argv = [checkpoint, "--data_file", text_file, "--num_samples", 8, "--seqlen", 32, "--sparsity", 0.25]
    argv += ["--device", "cpu", "--save_pruned_weights", "--eval_datasets", short, "--eval_seqlens", 32, *flags]
    enter = f'echo $$ > "{procs}"; ' if procs else ""
    command = ["bash", "-c", enter + 'exec "$@"', "bash", sys.executable, "-c", SCRIPT, *map(str, argv)]
    # Freed blocks are returned at once, so that the peak does not include memory cached by malloc.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
def test_model_slimming_streamed_fits_in_less_memory_than_the_model(large_checkpoint, text_file, tmp_path):
    with memory_limit(LIMIT_MIB) as procs:
        whole = run(large_checkpoint, text_file, "--save_dir", tmp_path / "whole", procs=procs)
        streamed = run(large_checkpoint, text_file, "--stream", "--save_dir", tmp_path / "streamed", procs=procs)
    # Killed by the kernel.
    assert whole.returncode == -9
    assert streamed.returncode == 0, streamed.stderr
    assert json.loads((tmp_path / "streamed" / "run.json").read_text())["perplexity"]


@pytest.mark.slow
def test_model_slimming_streamed_peaks_at_three_layers(large_checkpoint, checkpoint, text_file, tmp_path):
    peaks = []
    # The same run on a tiny model gives the memory of the interpreter and its libraries.
    for name, model in (("tiny", checkpoint), ("large", large_checkpoint)):
        process = run(model, text_file, "--stream", "--save_dir", tmp_path / name)
        assert process.returncode == 0, process.stderr
        peaks.append(float(process.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] <= 3 * LAYER_MIB + ALLOWANCE_MIB, peaks
