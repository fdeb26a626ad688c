"""``model_evaluate.py`` in several processes and with a divided model: the figures of one process and one device."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import transformers.integrations.accelerate as placement
from lm_eval.tasks import TaskManager

import model_evaluate
from ppl_eval.parallel import prepare_shards
from ppl_eval.zero_shot import load_tasks, task_specs
from slim_utils.common.errors import UserError
from slim_utils.layerwise.distributed import ProcessGroup
from tests.processes import run_python, run_ranks
from tests.tiny_models import make_tiny

LAUNCHER = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
# The script with something done in rank 1 in place of its forwards.
FAILING = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
from ppl_eval.truncation import TruncationCountingLM
score = TruncationCountingLM._loglikelihood_tokens
def fail(self, *args, **settings):
    if os.environ["RANK"] == "1":
        {failure}
    return score(self, *args, **settings)
TruncationCountingLM._loglikelihood_tokens = fail
sys.argv[0] = "model_evaluate.py"
runpy.run_path("model_evaluate.py", run_name="__main__")
"""
pytestmark = pytest.mark.usefixtures("cached_task_index")


@pytest.fixture
def argv(checkpoint, data_dir, tmp_path) -> list:
    """Flags of a run on nine rows of two tasks; the tiny model's 64 tokens are too few for the prompts of one."""
    flags = ["--model", checkpoint, "--data_dir", data_dir, "--tasks", "arc_easy,winogrande", "--limit", 9]
    return [*flags, "--num_fewshot", 6, "--batch_size", 4, "--output_path", tmp_path / "out.json"]


def main(*argv: object) -> dict[str, Any]:
    """Run the script in this process; its record."""
    model_evaluate.main(model_evaluate.build_parser().parse_args(list(map(str, argv))))
    return json.loads(Path(argv[argv.index("--output_path") + 1]).read_text())


def run(processes: int, *argv: object) -> subprocess.CompletedProcess:
    """Run the script in ``processes`` processes on the CPU."""
    return run_ranks(processes, "model_evaluate.py", *argv, "--device", "cpu")


def messages(process: subprocess.CompletedProcess) -> list[str]:
    """Lines of stderr without their times."""
    return [line.partition(" ")[2] for line in process.stderr.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True])
def test_model_evaluate_in_several_processes_gives_the_figures_of_one(launched, argv, tmp_path):
    runs, records = {}, {}
    for processes in (1, 2):
        path = argv[-1] = tmp_path / f"{processes}.json"
        if launched and processes == 2:
            runs[processes] = run_python(*LAUNCHER, "model_evaluate.py", *argv, "--device", "cpu")
        else:
            runs[processes] = run(processes, *argv)
        assert runs[processes].returncode == 0, runs[processes].stderr
        records[processes] = json.loads(path.read_text())
        assert records[processes]["config"]["processes"] == processes
    for task, values in records[1]["results"].items():
        assert records[2]["results"][task] == pytest.approx(values), task
    assert records[2]["averages"] == pytest.approx(records[1]["averages"])
    for key in ("samples", "truncated", "versions", "splits"):
        assert records[2][key] == records[1][key], key
    assert records[2]["truncated"] == {"arc_easy": 9}
    # One process prints and logs.
    text, _, table = runs[2].stdout.partition("\n\n")
    assert json.loads(text) == records[2]
    assert table == runs[1].stdout.partition("\n\n")[2]
    if not launched:
        assert messages(runs[2]) == messages(runs[1])


def requests(task: Any, rank: int, world_size: int) -> dict[tuple[int, int], Any]:
    """Arguments of the requests of a process by row and number of the answer."""
    task.set_fewshot_seed(1)
    task.build_all_requests(limit=9, rank=rank, world_size=world_size)
    return {(request.doc_id, request.idx): request.args for request in task.instances}


def test_prepare_shards_with_few_shot_examples_keeps_the_prompts_of_one_process(data_dir):
    manager = TaskManager()
    with task_specs(manager, ["arc_easy"], data_dir) as specs:
        (task,) = load_tasks(manager, specs, data_dir)["tasks"].values()
    task.set_config(key="num_fewshot", value=2)
    expected = requests(task, 0, 1)
    prepare_shards({"arc_easy": task}, ProcessGroup(0, 2), limit=9, num_fewshot=2)
    shards = [requests(task, rank, 2) for rank in range(2)]
    assert [len({row for row, _ in shard}) for shard in shards] == [5, 4]
    assert shards[0] | shards[1] == expected


@pytest.mark.slow
def test_model_evaluate_in_several_processes_with_wrong_input_prints_one_error(argv, tmp_path):
    argv[argv.index("--limit") + 1] = 1
    process = run(2, *argv)
    assert process.returncode == 2
    assert process.stderr.count("model_evaluate.py: error:") == 1
    assert "model_evaluate.py: error: --limit 1: 1 rows of arc_easy for 2 processes; start at most 1" in process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("from slim_utils.common.errors import UserError; raise UserError('token 64')", "error: token 64"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: rank 0: lost contact with another process (see its log)"),
    ],
)
def test_model_evaluate_after_an_error_of_one_process_ends_with_its_message(failure, message, argv, tmp_path):
    (tmp_path / "script").mkdir()
    script = tmp_path / "script" / "failing.py"
    script.write_text(FAILING.format(failure=failure))
    process = run_ranks(2, script, *argv, "--device", "cpu")
    assert process.returncode != 0
    assert process.stderr.count(message) == 1, process.stderr
    assert process.stderr.count("model_evaluate.py: error:") == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["script"]


@pytest.fixture(scope="module")
def models(slim, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """A pruned model with per-layer shapes, and a mixture of experts."""
    mixtral = tmp_path_factory.mktemp("models") / "mixtral"
    make_tiny("mixtral").save_pretrained(mixtral)
    tokenizer.save_pretrained(mixtral)
    return {"pruned": slim / "pruned_weights", "mixtral": mixtral}


@pytest.mark.parametrize("name", ["pruned", "mixtral"])
def test_model_evaluate_of_a_divided_model_gives_the_figures_of_a_whole_one(name, models, argv, tmp_path, caplog):
    argv[1] = models[name]
    records = []
    for flags in ([], ["--parallelize", "--trust_remote_code"]):
        argv[-1] = tmp_path / f"{len(flags)}.json"
        with caplog.at_level(logging.INFO):
            records.append(main(*argv, *flags))
    assert records[1]["results"] == records[0]["results"]
    assert records[1]["truncated"] == records[0]["truncated"] != {}
    assert [record["config"]["parallelize"] for record in records] == [False, True]
    assert any(message.startswith("--parallelize: modules on ") for message in caplog.messages)


@pytest.mark.parametrize("name", ["pruned", "mixtral"])
def test_model_evaluate_of_a_model_larger_than_memory_reads_layers_from_disk(
    name, models, argv, tmp_path, monkeypatch, caplog
):
    argv[1] = models[name]
    expected = main(*argv)
    # Less than the four layers.
    memory = {"pruned": 25_000, "mixtral": 100_000}[name]
    monkeypatch.setattr(placement, "get_max_memory", lambda max_memory=None: {"cpu": memory})
    argv[-1] = tmp_path / "divided.json"
    with caplog.at_level(logging.INFO):
        record = main(*argv, "--parallelize")
    assert record["results"] == expected["results"]
    (message,) = [message for message in caplog.messages if message.startswith("--parallelize: modules on ")]
    assert "disk: " in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallelize"], "--parallelize: needs one process"),
        (["--batch_size", "auto:4"], "--batch_size auto:4: with several processes, auto or a number"),
    ],
)
def test_model_evaluate_in_several_processes_with_a_flag_of_one_is_refused(flags, message, argv, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        main(*argv, *flags)
