"""README against the files it speaks of."""

import json
import re
import shlex
from pathlib import Path

import model_slimming

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def commands(start: str) -> list[str]:
    """Commands of README's bash blocks that begin with ``start``, line continuations joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(start)]


def test_pruning_commands_are_understood():
    found = commands("python model_slimming.py")
    assert len(found) == 2
    for command in found:
        words = shlex.split(command.partition("2>&1")[0])[2:]
        args = model_slimming.build_parser().parse_args(words)
        assert args.save_dir == "OUT"


def test_files_and_scripts_exist():
    for path in re.findall(r"(?:scripts|benchmarks|tests)/[\w/.]+\.(?:sh|py|json)", README):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_every_flag_is_listed():
    for action in model_slimming.build_parser()._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and flag != "--help":
                assert flag in README, flag


def test_results_are_those_of_the_file():
    rows = json.loads((RESULTS / "smollm2_perplexity.json").read_text())["rows"]
    names = {"repeated": "multi-head", "native": "grouped-query"}
    for row in rows:
        share, parameters = row.get("share_removed", 0), row["parameters"] / 1e6
        line = f"| {names[row['heads']]} | {100 * share:.1f} % | {parameters:.1f} M | {row['perplexity']:.2f} |"
        assert line in README


def test_quick_start_table_is_that_of_the_file():
    from scripts.compare_models import table

    result = json.loads((RESULTS / "quickstart.json").read_text())
    assert table(result["dense"], result["pruned"]) in README
