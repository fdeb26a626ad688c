"""How scripts are started, and ``scripts/compare_models.py``."""

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest

from scripts import compare_models
from slim_utils.common.errors import UserError
from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("scripts", "benchmarks")
SCRIPTS = [
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]
SUITE_MODULES = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} | {
    *FOLDERS
}


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_extend_sys_path_before_importing_the_suite(script):
    extended = False
    for statement in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
        extended |= ast.unparse(statement) == "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
        names = [alias.name for alias in getattr(statement, "names", ())] if isinstance(statement, ast.Import) else []
        names += [statement.module] if isinstance(statement, ast.ImportFrom) else []
        assert extended or not {name.partition(".")[0] for name in names} & SUITE_MODULES, ast.unparse(statement)
    assert extended


@pytest.mark.parametrize(
    "argv", [["scripts/compare_models.py"], ["scripts/report.py"], ["-m", "scripts.compare_models"]]
)
def test_scripts_run_by_path_and_as_modules_from_another_folder(argv, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if argv[0] == "-m":
        environment["PYTHONPATH"] = str(ROOT)
    else:
        argv = [str(ROOT / argv[0])]
    process = run_python(*argv, "--help", cwd=tmp_path, env=environment)
    assert process.returncode == 0 and process.stdout.startswith("usage: "), process.stderr


def parse(*argv) -> object:
    return compare_models.build_parser().parse_args(list(map(str, argv)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_seqlens", 128], r"--eval_seqlens 128: .* has 64 positions"),
        ([], r"--eval_seqlens 128: .* has 64 positions"),
        (["--eval_seqlens", 1], "--eval_seqlens: at least 2"),
        (["--eval_datasets", "none.txt", "--eval_seqlens", 32], "--eval_datasets none.txt: neither"),
        (["--device", "tpu"], "--device tpu: choose"),
        (["--out", "/none/x.json"], "--out /none/x.json: no such folder /none"),
    ],
)
def test_compare_models_with_wrong_flags_is_refused_before_loading(flags, message, checkpoint, monkeypatch):
    monkeypatch.setattr(compare_models, "measure_in_new_process", lambda *args: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        compare_models.main(parse(checkpoint, checkpoint, *flags))


def test_compare_models_of_a_missing_checkpoint_is_one_line(checkpoint, text_file, tmp_path):
    flags = ["--eval_datasets", text_file, "--eval_seqlens", 32, "--device", "cpu"]
    with pytest.raises(UserError, match="no such folder"):
        compare_models.main(parse(tmp_path / "none", checkpoint, *flags))
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be loaded"):
        compare_models.measure(parse(tmp_path, tmp_path, *flags))


@pytest.mark.parametrize("names", [["dense", "pruned"], ["dense", "pruned", "recovered"]])
def test_compare_models_passes_trust_remote_code_and_records_figures(
    checkpoint, text_file, tmp_path, monkeypatch, capsys, names
):
    trusted = []
    load = compare_models.load_model
    monkeypatch.setattr(compare_models, "load_model", lambda *args: (trusted.append(args[2]), load(*args))[1])

    def in_this_process(args, path):
        return compare_models.measure(parse(path, path, *args.flags))

    monkeypatch.setattr(compare_models, "measure_in_new_process", in_this_process)
    flags = ["--eval_datasets", text_file, "--eval_seqlens", 32, 16, "--device", "cpu", "--trust_remote_code"]
    args = parse(*[checkpoint] * len(names), *flags, "--out", tmp_path / "out.json")
    args.flags = flags
    compare_models.main(args)
    record = json.loads((tmp_path / "out.json").read_text())
    texts = [f"perplexity {text_file.name}, seqlen {seqlen}" for seqlen in (32, 16)]
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == [names[0], *(word for name in names[1:] for word in (name, "ratio"))]
    for name in names:
        assert list(record[name]["perplexities"]) == texts and record[name]["parameters"] > 0
        assert f"\n{name}:" in printed
    assert trusted == [True] * len(names)


def test_compare_models_with_a_failed_process_exits_with_its_code(checkpoint, text_file, monkeypatch):
    args = parse(checkpoint, checkpoint, "--eval_datasets", text_file, "--eval_seqlens", 32, "--trust_remote_code")
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, codes.pop())

    monkeypatch.setattr(compare_models.subprocess, "run", run)
    codes = [-9, 2]
    with pytest.raises(SystemExit) as ended:
        compare_models.measure_in_new_process(args, str(checkpoint))
    assert ended.value.code == 2 and "--trust_remote_code" in commands[0]
    with pytest.raises(UserError, match="killed by signal 9"):
        compare_models.measure_in_new_process(args, str(checkpoint))


@pytest.mark.parametrize("script", ["model_slimming.py", "model_finetune.py", "model_evaluate.py", "test_flops.py"])
def test_entry_scripts_with_help_print_their_usage(script, tmp_path):
    process = run_python(ROOT / script, "--help", cwd=tmp_path)
    assert process.returncode == 0 and process.stdout.startswith(f"usage: {script} "), process.stderr
