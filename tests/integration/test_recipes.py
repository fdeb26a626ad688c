"""The recipes in ``scripts/`` with ``--smoke``, on a tiny model and on SmolLM2."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import random_text

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("prune.sh", "finetune.sh", "recover.sh", "prune_in_rounds.sh", "evaluate.sh", "flops.sh", "llama_7b_p20.sh")
VARIABLES = ("MODEL", "DATA", "EVAL", "OUT", "SFT_DATA", "TASK_DATA", "TASKS")
VARIABLES += ("DENSE", "TEXT", "TOKENS", "TRAIN", "ROUNDS", "RATIO", "NPROC", "FLAGS", "CHECK_ONLY")

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "python").exists(), reason="needs scripts/test.sh's .venv"
)


# Prints the command line of model_finetune.py in place of running it.
SITECUSTOMIZE = """
import os, sys
if "model_finetune.py" in sys.orig_argv:
    print(*sys.orig_argv, sep="|", flush=True)
    os._exit(2)
"""


def run(recipe: str, *flags: str, cwd: Path | None = None, **variables: object) -> subprocess.CompletedProcess:
    """Run a recipe with only the given variables set."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {name: str(value) for name, value in variables.items()}
    command = ["bash", str(ROOT / "scripts" / recipe), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory) -> Path:
    """Local task files with rows in PIQA's columns."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "piqa").mkdir()
    rows = [{"goal": random_text(3, i), "sol1": "w3", "sol2": "w4 w5", "label": i % 2} for i in range(10)]
    (folder / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_recipe_llama_7b_p20_on_a_tiny_model_runs_all_stages(
    checkpoint, text_file, instruction_file, task_dir, tmp_path
):
    """``llama_7b_p20.sh`` runs all four stage recipes."""
    out = tmp_path / "new" / "p20"
    variables = {"MODEL": checkpoint, "DATA": text_file, "EVAL": f"wikitext2={text_file}", "TASK_DATA": task_dir}
    process = run("llama_7b_p20.sh", "--smoke", **variables, SFT_DATA=instruction_file, OUT=out)
    assert process.returncode == 0, process.stdout + process.stderr
    assert (out / "pruned_weights" / "model.safetensors").is_file()
    assert (out.parent / "p20_sft" / "lora_fused_model" / "model.safetensors").is_file()
    assert "perplexity wikitext2 seqlen 32" in (out.parent / "p20.ppl").read_text()
    assert "step 3: loss" in (out.parent / "p20_sft.log").read_text()
    for name in ("p20_zero_shot.json", "p20_sft_zero_shot.json"):
        assert json.loads((out.parent / name).read_text())["samples"] == {"piqa": 8}
    assert "decode (tokens/s)" in (out.parent / "p20_flops.json.log").read_text()
    assert len(json.loads((out.parent / "p20_flops.json").read_text())["models"]) == 2


@pytest.mark.slow
def test_recipe_prune_in_rounds_on_a_tiny_model_has_the_dense_model_as_teacher(checkpoint, text_file, tmp_path):
    text = tmp_path / "train.txt"
    text.write_text(random_text(3000, 5))
    variables = {"MODEL": checkpoint, "DATA": text_file, "EVAL": f"wikitext2={text_file}", "TEXT": text}
    process = run("prune_in_rounds.sh", "--smoke", **variables, OUT=tmp_path / "out", RATIO=0.4, ROUNDS=2)
    assert process.returncode == 0, process.stdout + process.stderr
    for number in (1, 2):
        record = json.loads((tmp_path / "out" / f"recovered_{number}" / "run.json").read_text())
        assert record["arguments"]["distill_from"] == str(checkpoint)
        assert record["arguments"].get("skip_train_tokens", 0) == (number - 1) * 384
        assert record["arguments"]["model_name_or_path"].endswith(f"pruned_{number}/pruned_weights")
    steps = json.loads((tmp_path / "out" / "recovered_2" / "slimgpt.json").read_text())["steps"]
    assert [step["kind"] for step in steps] == ["pruning", "recovery"] * 2
    sizes = json.loads((tmp_path / "out" / "pruned_2" / "run.json").read_text())["sizes"]
    assert sizes["block_share_removed_in_total"] == pytest.approx(0.4, abs=0.05)

    # Interrupted in the last recovery, it continues there.
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/run.json")}
    last = tmp_path / "out" / "recovered_2" / "run.json"
    last.write_text(json.dumps(json.loads(last.read_text()) | {"finished": False}))
    process = run("prune_in_rounds.sh", "--smoke", **variables, OUT=tmp_path / "out", RATIO=0.4, ROUNDS=2)
    assert process.returncode == 0, process.stdout + process.stderr
    assert {path for path in records if path.stat().st_mtime_ns != records[path]} == {last}
    assert json.loads(last.read_text())["finished"]
    process = run("prune_in_rounds.sh", "--smoke", **variables, OUT=tmp_path / "out", RATIO=0.5, ROUNDS=2)
    assert process.returncode == 2 and "error: OUT" in process.stderr and "RATIO=0.4" in process.stderr


@pytest.mark.slow
def test_recipe_prune_in_rounds_with_lora_prunes_the_fused_model(checkpoint, text_file, tmp_path):
    text, out = tmp_path / "train.txt", tmp_path / "out"
    text.write_text(random_text(3000, 5))
    variables = {"MODEL": checkpoint, "DATA": text_file, "EVAL": f"wikitext2={text_file}", "TEXT": text, "OUT": out}
    process = run("prune_in_rounds.sh", "--smoke", **variables, TRAIN="lora", RATIO=0.4, ROUNDS=2)
    assert process.returncode == 0, process.stdout + process.stderr
    record = json.loads((out / "pruned_2" / "run.json").read_text())
    assert record["arguments"]["model_path"].endswith("recovered_1/lora_fused_model")
    steps = json.loads((out / "recovered_2" / "lora_fused_model" / "slimgpt.json").read_text())["steps"]
    assert [step["kind"] for step in steps] == ["pruning", "recovery"] * 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_with_an_unknown_flag_is_one_line(recipe):
    process = run(recipe, "--fast")
    assert process.returncode == 2
    line = process.stderr.splitlines()[-1]
    assert line.endswith("error: --fast: the only flag is --smoke; set the variables at the top")


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "llama_7b_p20.sh"])
def test_recipe_without_a_model_is_refused(recipe, tmp_path):
    process = run(recipe, OUT=tmp_path / "new" / "out")
    assert process.returncode == 2
    assert process.stderr == f"{recipe}: error: set MODEL to a checkpoint folder or hub name\n"
    assert not list(tmp_path.iterdir())


def test_recipe_recover_without_a_teacher_is_refused(tmp_path):
    process = run("recover.sh", MODEL="/none", OUT=tmp_path / "new" / "out")
    assert process.returncode == 2
    assert process.stderr == "recover.sh: error: set DENSE to the dense model\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"RATIO": "half"},
        {"RATIO": 1.5},
        {"RATIO": 0},
        {"ROUNDS": 0},
        {"ROUNDS": 1.5},
        {"TOKENS": 100},
        {"TOKENS": "inf"},
    ],
    ids=str,
)
def test_recipe_prune_in_rounds_with_a_wrong_number_is_one_line(wrong, tmp_path):
    process = run("prune_in_rounds.sh", MODEL="/none", OUT=tmp_path / "out", **wrong)
    assert process.returncode == 2
    values = {"RATIO": "0.5", "ROUNDS": "2", "TOKENS": "1e6"} | wrong
    knobs = ", ".join(f"{name} {value}" for name, value in values.items())
    ranges = "a ratio is between 0 and 1, rounds are at least 1, tokens at least 512"
    assert process.stderr == f"prune_in_rounds.sh: error: {knobs}: {ranges}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"TRAIN": "heads"}, "argument --train: invalid choice: 'heads'"),
        ({"TEXT": "c4:2 none.txt"}, "--train_text none.txt: no such file"),
        pytest.param({"TEXT": "EMPTY:2"}, "--train_text EMPTY: no text in it", marks=pytest.mark.slow),
        pytest.param({"EVAL": "EMPTY"}, "tokens are fewer than one window", marks=pytest.mark.slow),
        pytest.param({"EVAL": "wikitext3"}, "wikitext3", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recipe_prune_in_rounds_with_a_wrong_recovery_is_refused_before_pruning(
    checkpoint, text_file, tmp_path, wrong, message
):
    empty = tmp_path / "empty.txt"
    empty.touch()
    variables = {"MODEL": checkpoint, "DATA": text_file, "EVAL": text_file, "TEXT": text_file} | wrong
    variables = {name: str(value).replace("EMPTY", str(empty)) for name, value in variables.items()}
    process = run("prune_in_rounds.sh", "--smoke", **variables, OUT=tmp_path / "out")
    assert process.returncode == 2
    assert message.replace("EMPTY", str(empty)) in process.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("recipe", ["recover.sh", "finetune.sh", "prune_in_rounds.sh", "llama_7b_p20.sh"])
@pytest.mark.parametrize("processes", ["two", "0", "1.5"])
def test_recipe_with_a_wrong_number_of_processes_is_one_line(recipe, processes, tmp_path):
    process = run(recipe, MODEL="/none", DENSE="/none", OUT=tmp_path / "out", NPROC=processes)
    assert process.returncode == 2
    assert process.stderr == f"{recipe}: error: NPROC {processes}: give a whole number, at least 1\n"
    assert not list(tmp_path.iterdir())


def test_recipe_prune_in_rounds_with_several_processes_checks_with_deepspeed(checkpoint, text_file, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    variables = {"MODEL": checkpoint, "DATA": text_file, "EVAL": text_file, "TEXT": text_file, "PYTHONPATH": tmp_path}
    for processes in (1, 2):
        process = run("prune_in_rounds.sh", "--smoke", **variables, NPROC=processes, OUT=tmp_path / "out")
        assert process.returncode == 2
        command = process.stdout.splitlines()[-1]
        assert "--check_only|true" in command
        assert ("--deepspeed|configs/deepspeed.json" in command) == (processes == 2)


@pytest.mark.parametrize("recipe", ["recover.sh", "prune_in_rounds.sh"])
def test_recipe_of_a_text_in_a_folder_with_spaces_reads_it(recipe, text_file, tmp_path):
    folder = tmp_path / "my texts"
    folder.mkdir()
    (folder / "train.txt").touch()
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    variables = {"MODEL": "/none", "DENSE": "/none", "DATA": text_file, "EVAL": text_file, "PYTHONPATH": tmp_path}
    process = run(recipe, cwd=folder, **variables, TEXT="c4 train.txt:0.3", OUT=tmp_path / "out")
    assert f"|--train_text|c4|{folder}/train.txt:0.3|--train|" in process.stdout, process.stdout + process.stderr


def test_recipe_prune_in_rounds_without_its_settings_is_one_line(tmp_path):
    (tmp_path / "pruned_1").mkdir()
    (tmp_path / "pruned_1" / "run.json").write_text("{}")
    process = run("prune_in_rounds.sh", MODEL="/none", OUT=tmp_path)
    assert process.returncode == 2
    message = f"OUT {tmp_path} was begun with other settings; choose another OUT"
    assert process.stderr == f"prune_in_rounds.sh: error: {message}\n"


def test_recipe_prune_in_rounds_that_finished_nothing_begins_with_other_settings(text_file, tmp_path):
    for model in ("/none", "/nowhere"):
        process = run("prune_in_rounds.sh", MODEL=model, DATA=text_file, OUT=tmp_path / "out")
        assert process.returncode == 2
        assert f"model {model}: no such folder" in process.stdout + process.stderr


def test_recipe_with_a_failing_stage_fails(tmp_path):
    process = run("prune.sh", MODEL="/none", DATA="c4", OUT=tmp_path / "out")
    assert process.returncode == 2
    assert "model /none: no such folder" in (tmp_path / "out.ppl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_on_smollm2_runs(recipe, tmp_path):
    """Fetches SmolLM2-135M into ``$SLIMGPT_CACHE`` in the first run."""
    process = run(recipe, "--smoke", OUT=tmp_path / "out")
    assert process.returncode == 0, process.stdout + process.stderr
    assert list(tmp_path.iterdir())
