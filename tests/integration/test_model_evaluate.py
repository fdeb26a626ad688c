"""``model_evaluate.py`` against the command line of lm-eval, and run as a user runs it."""

import copy
import json
import logging
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval.tasks
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import model_evaluate
import model_slimming
from ppl_eval.task_warnings import package_log
from ppl_eval.zero_shot import README_TASKS, averages, check_specials, load_tasks, results_table, task_specs
from slim_utils.common.errors import UserError
from tests.integration.task_files import ROWS
from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path(lm_eval.tasks.__file__).parent
DEFINITIONS = {
    "openbookqa": "openbookqa/openbookqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
}
pytestmark = pytest.mark.usefixtures("cached_task_index")


def main(*argv) -> None:
    """Run the script in this process."""
    model_evaluate.main(model_evaluate.build_parser().parse_args(list(map(str, argv))))


def run(*argv, **options) -> subprocess.CompletedProcess:
    """Run the script in a new process."""
    return run_python("model_evaluate.py", *argv, **options)


@pytest.fixture(scope="module")
def result(tmp_path_factory, checkpoint, data_dir) -> tuple[dict, str, subprocess.CompletedProcess]:
    """JSON, printed text and process of the README's command line on local files."""
    path = tmp_path_factory.mktemp("results") / "result.json"
    process = run(
        *["--model", checkpoint, "--tasks", ",".join(README_TASKS), "--device", "cpu", "--batch_size", 4],
        *["--output_path", path, "--no_cache", "--data_dir", data_dir],
    )
    assert process.returncode == 0, process.stderr
    return json.loads(path.read_text()), process.stdout, process


@pytest.mark.slow
def test_model_evaluate_results_equal_those_of_the_lm_eval_command(result, checkpoint, data_dir, tmp_path):
    for task, definition in DEFINITIONS.items():
        source = {path.stem: str(path) for path in (data_dir / task).iterdir()}
        content = {"include": str(TASKS / definition), "task": f"mine_{task}", "dataset_path": "json"}
        content |= {"dataset_name": None, "dataset_kwargs": {"data_files": source}, "training_split": None}
        content |= {f"{split}_split": None for split in ("validation", "test") if split not in source}
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(content))
    names = ",".join(f"mine_{task}" for task in DEFINITIONS)
    command = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={checkpoint}"]
    command += ["--tasks", names, "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "4"]
    command += ["--num_fewshot", "0", "--output_path", str(tmp_path / "out")]
    process = run_python(*command)
    assert process.returncode == 0, process.stderr
    (file,) = (tmp_path / "out").rglob("*.json")
    expected = json.loads(file.read_text())["results"]
    for task in README_TASKS:
        task_expected = expected[f"mine_{task}"]
        task_result = result[0]["results"][task]
        assert task_result["acc"] == task_expected["acc,none"], task
        assert task_result["acc_stderr"] == pytest.approx(task_expected["acc_stderr,none"])
        assert task_result.get("acc_norm") == task_expected.get("acc_norm,none"), task
    # The tasks have different results, so that the comparison is meaningful.
    assert len({values["acc"] for values in result[0]["results"].values()}) > 2


def test_model_evaluate_prints_json_then_a_table(result):
    record, printed, process = result
    counts = record["samples"]
    table = results_table(record["results"], counts, record["averages"])
    assert printed.endswith(f"\n\n{table}\n")
    assert json.loads(printed.removesuffix(f"\n\n{table}\n")) == record
    assert record["splits"] == {
        task: "test" if task in ("openbookqa", "arc_easy", "arc_challenge") else "validation" for task in README_TASKS
    }
    assert set(counts.values()) == {ROWS}
    assert record["environment"]["versions"]["lm-eval"]
    assert set(record["versions"]) == set(README_TASKS)
    assert "--no_cache has no effect" in process.stderr
    assert "it/s" not in process.stderr


def test_averages_of_tasks_with_and_without_acc_norm():
    metrics = {
        "hellaswag": {"acc": 0.3, "acc_norm": 0.5},
        "arc_easy": {"acc": 0.6, "acc_norm": 0.4},
        "boolq": {"acc": 0.9},
        "gsm8k": {"exact_match": 0.1},
    }
    assert averages(metrics) == pytest.approx({"acc": 0.6, "acc_norm": 0.6, "papers": 2 / 3})
    assert averages({"gsm8k": {"exact_match": 0.1}}) == {}
    table = results_table(metrics, {}, averages(metrics))
    assert "50.00*" in table and "60.00*" in table and "90.00*" in table and "40.00*" not in table


@pytest.mark.slow
def test_model_evaluate_of_masked_and_pruned_models_gives_equal_results(tmp_path, checkpoint, text_file, data_dir):
    slim = tmp_path / "slim"
    argv = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.5]
    argv += ["--skip_evaluate", "--save_pruned_weights", "--save_dir", slim]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))
    results = []
    for model in (slim, slim / "pruned_weights"):
        out = tmp_path / "result.json"
        argv = ["--model", model, "--tasks", "arc_easy,piqa", "--data_dir", data_dir, "--device", "cpu", "--limit", 8]
        main(*argv, "--batch_size", "auto", "--output_path", out, "--overwrite", "--num_fewshot", 1)
        results.append(json.loads(out.read_text()))
    assert results[0]["results"] == results[1]["results"]
    assert results[0]["samples"] == {"arc_easy": 8, "piqa": 8}
    assert results[0]["config"]["num_fewshot"] == 1


def test_model_evaluate_with_bos_always_starts_prompts_with_bos(tmp_path, checkpoint, data_dir, monkeypatch):
    encoded: list[list[int]] = []
    encode = HFLM.tok_encode
    monkeypatch.setattr(
        HFLM,
        "tok_encode",
        lambda self, text, *args, **options: encoded.append(encode(self, text, *args, **options)) or encoded[-1],
    )
    for bos in ("auto", "always", "never"):
        encoded.clear()
        argv = ["--model", checkpoint, "--tasks", "piqa", "--data_dir", data_dir, "--device", "cpu", "--limit", 2]
        main(*argv, "--bos", bos, "--output_path", tmp_path / f"{bos}.json")
        assert {ids[0] == 1 for ids in encoded} == {bos == "always"}, bos
        assert json.loads((tmp_path / f"{bos}.json").read_text())["config"]["bos"] is (bos == "always")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "arc_esy"], r"--tasks arc_esy: no such task; nearest: .*arc_easy"),
        (["--tasks", "qqqqzzzz"], "--tasks qqqqzzzz: no such task$"),
        (["--tasks", "ai2_arc"], "--tasks ai2_arc: is a group; with --data_dir, give"),
        (["--tasks", "lambada_openai"], "no lambada_openai/validation or lambada_openai/test"),
    ],
)
def test_model_evaluate_of_an_invalid_task_is_refused(checkpoint, data_dir, argv, message):
    with pytest.raises(UserError, match=message) as error:
        main("--model", checkpoint, "--data_dir", data_dir, "--device", "cpu", *argv)
    assert "\n" not in str(error.value)


def test_model_evaluate_of_unreadable_data_is_refused(checkpoint, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"question": "w3"}\n')
    with pytest.raises(UserError, match=r"the data of piqa: .*; check the columns of its files"):
        main("--model", checkpoint, "--data_dir", tmp_path, "--tasks", "piqa", "--device", "cpu")
    with pytest.raises(UserError, match=r"the data of piqa: .*; pass local files with --data_dir DIR"):
        main("--model", checkpoint, "--tasks", "piqa", "--device", "cpu")


def test_load_tasks_from_an_odd_path_with_an_unwritable_cache_reads_rows(data_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    odd = tmp_path / "a::b, run[1]"
    shutil.copytree(data_dir / "hellaswag", odd / "hellaswag")
    manager = TaskManager()
    with task_specs(manager, ["hellaswag"], odd) as specs:
        tasks = load_tasks(manager, specs, odd)["tasks"]
    # The rows outlive the temporary folder.
    assert len(list(tasks["hellaswag"].validation_docs())) == ROWS


def test_load_tasks_with_an_unwritable_cache_names_it(monkeypatch, tmp_path):
    def load(self, specs):
        raise PermissionError(13, "Permission denied", "/sys/cache")

    monkeypatch.setattr(TaskManager, "load", load)
    with pytest.raises(UserError, match=r"cache of downloads cannot be written \(.*'/sys/cache'\); set HF_HOME"):
        load_tasks(TaskManager(), ["piqa"], None)


@pytest.mark.parametrize(
    ("kind", "removed", "usable"),
    [
        ("multiple_choice", ["eos_token"], True),
        ("multiple_choice", ["bos_token"], True),
        ("generate_until", ["eos_token"], False),
        ("multiple_choice", ["eos_token", "bos_token"], False),
        ("multiple_choice", ["eos_token", "unk_token"], False),
    ],
)
def test_check_specials_without_a_needed_token_is_refused(tokenizer, kind, removed, usable):
    changed = copy.deepcopy(tokenizer)
    for name in removed:
        setattr(changed, name, None)
    tasks = [SimpleNamespace(OUTPUT_TYPE=kind)]
    if usable:
        check_specials(changed, tasks, "DIR")
        return
    with pytest.raises(UserError, match=r"--model DIR: the tokenizer has no end-of-sequence token.*set eos_token"):
        check_specials(changed, tasks, "DIR")


def test_model_evaluate_of_a_tokenizer_without_special_tokens_is_refused(checkpoint, data_dir, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "bare")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "bare" / name
        if path.is_file():
            content = json.loads(path.read_text())
            path.write_text(json.dumps({key: value for key, value in content.items() if not key.endswith("_token")}))
    with pytest.raises(UserError, match="the tokenizer has no end-of-sequence token"):
        main("--model", tmp_path / "bare", "--tasks", "piqa", "--data_dir", data_dir, "--device", "cpu", "--limit", 2)


def test_model_evaluate_with_few_shot_examples_warns_once_per_task(checkpoint, data_dir, tmp_path, caplog):
    argv = ["--model", checkpoint, "--data_dir", data_dir, "--device", "cpu", "--limit", 6, "--batch_size", 4]
    out = tmp_path / "out.json"
    with caplog.at_level(logging.WARNING):
        main(*argv, "--tasks", "piqa, winogrande,", "--num_fewshot", 11, "--output_path", out)
    record = json.loads(out.read_text())
    assert record["truncated"]["piqa"] == 6
    warnings = [message for message in caplog.messages if message.startswith(("piqa", "winogrande"))]
    assert len(warnings) == 2 + len(record["truncated"])
    assert any("piqa: the few-shot examples come from the evaluated split (validation)" in line for line in warnings)
    expected = "piqa: the prompts of 6 of 6 rows exceed the model's 64 tokens and were truncated from the left"
    assert any(line.startswith(expected) and line.endswith("lower --num_fewshot") for line in warnings)
    assert not any("Combined length" in line or "pretrained" in line for line in caplog.messages)
    # A single example from a separate train file.
    (tmp_path / "tasks").mkdir()
    shutil.copytree(data_dir / "piqa", tmp_path / "tasks" / "piqa")
    shutil.copy(data_dir / "piqa" / "validation.jsonl", tmp_path / "tasks" / "piqa" / "train.jsonl")
    caplog.clear()
    argv[3] = tmp_path / "tasks"
    main(*argv, "--tasks", "piqa", "--num_fewshot", 1, "--output_path", out, "--overwrite")
    assert not any(message.startswith("piqa") for message in caplog.messages)
    assert json.loads(out.read_text())["truncated"] == {}


def test_package_log_of_repeated_warnings_shows_each_kind_once(caplog):
    package = logging.getLogger("lm_eval.api.task")
    for level, infos in ((logging.WARNING, []), (logging.INFO, ["a prompt"])):
        caplog.clear()
        with package_log(level):
            for row in range(3):
                package.warning("Label %d is not one of the choices, Sample:\n\n{'row': %d}", row, row)
            package.info("a prompt")
        assert caplog.messages == ["lm-eval: Label 0 is not one of the choices, Sample: {'row': 0}", *infos]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_size", "many"], "--batch_size many: must be auto or a number"),
        (["--batch_size", "0"], "--batch_size 0: must be auto or a number"),
        (["--max_batch_size", "0"], "--max_batch_size 0: at least 1"),
        (["--limit", "0"], "--limit 0: above 0"),
        (["--num_fewshot", "-1"], "--num_fewshot -1: at least 0"),
        (["--tasks", " , "], "--tasks: give at least one"),
        (["--data_dir", "/none"], "--data_dir /none: no such folder"),
        (["--device", "tpu"], "--device tpu: choose auto"),
        (["--parallelize", "--device", "cpu"], "--parallelize uses all GPUs; leave --device cpu out"),
        (["--output_path", "/none/x.json"], "--output_path /none/x.json: no such folder /none"),
        (["--output_path", "README.md"], "--output_path README.md: exists; choose another or pass --overwrite"),
    ],
)
def test_model_evaluate_with_a_wrong_flag_is_refused(argv, message):
    with pytest.raises(UserError, match=message):
        main("--model", "x", *argv)


def test_model_evaluate_with_a_wrong_flag_exits_with_one_line():
    process = run("--model", "/none", "--batch_size", "x")
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("model_evaluate.py: error: --batch_size x")
    assert "Traceback" not in process.stderr


def test_model_evaluate_of_a_quantised_model_is_refused_before_reading_tasks(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "gptq")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised \(gptq\)"):
        main("--model", tmp_path / "gptq", "--tasks", "none of them", "--device", "cpu")


def test_model_evaluate_with_tokens_beyond_the_embedding_is_one_line(checkpoint, tokenizer, tmp_path, data_dir):
    shutil.copytree(checkpoint, tmp_path / "grown")
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["w900"])
    more.save_pretrained(tmp_path / "grown")
    rows = (data_dir / "piqa" / "validation.jsonl").read_text()
    (tmp_path / "tasks" / "piqa").mkdir(parents=True)
    (tmp_path / "tasks" / "piqa" / "validation.jsonl").write_text(rows.replace("w3", "w900").replace("w4", "w900"))
    with pytest.raises(UserError, match="token 64, but the model has embeddings of tokens 0 to 63"):
        main("--model", tmp_path / "grown", "--tasks", "piqa", "--data_dir", tmp_path / "tasks", "--device", "cpu")
