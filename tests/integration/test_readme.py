"""README against the files it speaks of."""

import argparse
import json
import re
import shlex
from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest

import model_evaluate
import model_slimming
import test_flops
from ppl_eval.zero_shot import ACC_NORM_IN_PAPERS
from scripts import report
from train_utils import finetune_args

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# By the heading they are described under.
PARSERS = {
    "Prune": model_slimming.build_parser,
    "Evaluate": model_evaluate.build_parser,
    "Count and time": test_flops.build_parser,
}
# Of torchrun, of vLLM, and what the recipes take.
OF_OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--model-impl", "--trust-remote-code"}
OF_OTHERS |= {"--smoke"}
RESULTS = ROOT / "benchmarks" / "results"


def commands(start: str) -> list[str]:
    """Commands of README's bash blocks that begin with ``start``, line continuations joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(start)]


def test_pruning_commands_are_understood():
    found = commands("python model_slimming.py")
    found += [line for line in commands("torchrun") if "model_slimming.py" in line]
    assert len(found) == 4
    for command in found:
        words = shlex.split(command.partition("2>&1")[0])
        words = words[words.index("model_slimming.py") + 1 :]
        args = model_slimming.build_parser().parse_args(words)
        assert args.save_dir == "OUT"


@pytest.mark.parametrize(("script", "count"), [(model_evaluate, 1), (test_flops, 2)])
def test_measuring_commands_are_understood(script, count):
    found = commands(f"python {script.__name__}.py")
    assert len(found) == count
    for command in found:
        script.build_parser().parse_args(shlex.split(command)[2:])


def test_report_command_is_understood():
    (command,) = commands("python -m scripts.report")
    args = report.build_parser().parse_args(shlex.split(command)[3:])
    assert (len(args.runs), args.out) == (3, Path("report"))


def test_fine_tuning_command_is_understood(monkeypatch):
    monkeypatch.setattr(finetune_args, "provide_single_process_group", lambda words: None)
    (command,) = [line for line in commands("torchrun") if "model_finetune.py" in line]
    words = shlex.split(command.partition("2>&1")[0])
    words = words[words.index("model_finetune.py") + 1 :]
    at = words.index("--deepspeed")
    assert (ROOT / words[at + 1]).is_file()
    # Setting DeepSpeed up takes a process group.
    args = finetune_args.parse_args(words[:at] + words[at + 2 :])
    assert args.model.use_lora and args.training.output_dir == "SFT"


def test_recipes_are_named_with_variables_they_have():
    for command in re.findall(r"^.*bash scripts/\w+\.sh$", README, flags=re.MULTILINE):
        *variables, _, script = shlex.split(command)
        text = (ROOT / script).read_text(encoding="utf-8")
        for variable in variables:
            assert f"{variable.partition('=')[0]}=${{" in text, command


def test_files_and_scripts_exist():
    for path in re.findall(r"(?:scripts|benchmarks|tests)/[\w/.]+\.(?:sh|py|json)", README):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def named_flags(text: str) -> set[str]:
    """Whole flags that ``text`` names."""
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))


def section(title: str) -> str:
    """README's text under a heading of the second level."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, flags=re.DOTALL | re.MULTILINE)
    return text


def parser_flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def test_named_flags_are_whole():
    assert named_flags("`--min_sparsity A`, (--max) x--y ---z --a-b=3") == {"--min_sparsity", "--max", "--a-b"}


@pytest.mark.parametrize("title", PARSERS)
def test_every_flag_of_a_script_is_listed_in_its_section(title):
    assert parser_flags(PARSERS[title]()) <= named_flags(section(title))


def test_every_flag_of_fine_tuning_is_listed_in_its_section():
    named = named_flags(section("Recover"))
    for group in (finetune_args.ModelArguments, finetune_args.DataArguments, finetune_args.SparseArguments):
        for option in fields(group):
            assert (f"--{option.name}" in named) != (option.name in finetune_args.REFUSED_FLAGS), option.name


@pytest.mark.parametrize("title", [*PARSERS, "Recover"])
def test_every_flag_named_in_the_section_of_a_script_is_its_own(title):
    known = (PARSERS | {"Recover": finetune_args.build_parser})[title]
    assert named_flags(section(title)) - OF_OTHERS <= parser_flags(known()) | set(finetune_args.RENAMED_FLAGS)


def test_every_flag_that_is_named_is_that_of_a_script():
    flags = parser_flags(finetune_args.build_parser()) | set(finetune_args.RENAMED_FLAGS) | OF_OTHERS
    flags = flags.union(*(parser_flags(build()) for build in PARSERS.values()))
    for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]:
        flags |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    for path in ROOT.glob("scripts/*.sh"):
        flags |= set(re.findall(r"^ +(--\w+)\)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named_flags(README) <= flags


def test_results_are_those_of_the_file():
    rows = json.loads((RESULTS / "smollm2_perplexity.json").read_text())["rows"]
    rows += json.loads((RESULTS / "smollm2_query_heads.json").read_text())["rows"][1:]
    names = {"repeated": "multi-head", "native": "kv groups", "native_query_head": "query heads"}
    for row in rows:
        share, parameters = row.get("share_removed", 0), row["parameters"] / 1e6
        line = f"| {names[row['heads']]} | {100 * share:.1f} % | {parameters:.1f} M | {row['perplexity']:.2f} |"
        assert line in README


def test_speed_table_is_that_of_the_file():
    result = json.loads((RESULTS / "quickstart_speed.json").read_text())
    dense, pruned = result["models"].values()
    rows = [("parameters (M)", "parameters", 1e6), ("MACs, 64 tokens (G)", "macs", 1e9)]
    figures = [(name, dense[key] / unit, pruned[key] / unit) for name, key, unit in rows]
    figures.append(("weights (MiB)", dense["weight_bytes"] / (1 << 20), pruned["weight_bytes"] / (1 << 20)))
    caches = [sum(layer["kv_cache_bytes"] for layer in model["layers"]) / (1 << 10) for model in (dense, pruned)]
    figures.append(("KV cache (KiB/token)", *caches))
    for timing in result["timings"]:
        setting = f"batch {timing['batch_size']}, {timing['length']} tokens"
        for name, key in (("prefill (ms)", "prefill_seconds"), ("decode (ms/step)", "decode_seconds")):
            figures.append((f"{setting}: {name}", *(1e3 * latency[key] for latency in timing["latencies"])))
    for name, a, b in figures:
        assert f"| {name} | {a:.2f} | {b:.2f} | {b / a:.3f} |" in README


def test_quick_start_table_is_that_of_the_file():
    from scripts.compare_models import table

    result = json.loads((RESULTS / "quickstart.json").read_text())
    assert table(result["dense"], result["pruned"]) in README


@pytest.mark.parametrize("name", ["smollm2_recovery", "smollm2_distillation", "smollm2_distillation_best"])
def test_recovery_table_is_that_of_the_file(name):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    for row in result["rows"]:
        perplexities = {(entry["dataset"], entry["seqlen"]): entry["perplexity"] for entry in row["perplexity"]}
        figures = [f"{perplexities[key]:.2f}" for key in product(("wikitext2", "alpaca"), (128, 2048))]
        if "zero_shot" in row:
            scores = row["zero_shot"]["results"]
            for task in ("openbookqa", "arc_easy", "winogrande", "piqa"):
                figures.append(f"{100 * scores[task]['acc_norm' if task in ACC_NORM_IN_PAPERS else 'acc']:.1f}")
            figures.append(f"{100 * row['zero_shot']['averages']['papers']:.1f}")
        share = f"{100 * row.get('share_removed', 0):.1f} %"
        assert f"| {row['model']} | {share} | {' | '.join(figures)} |" in README


def test_serving_table_is_that_of_the_file():
    rows = json.loads((RESULTS / "serving_speed.json").read_text())["rows"]
    for start, name in ((0, "Transformers"), (3, "vLLM"), (6, "llama.cpp, f16")):
        dense, *pruned = rows[start : start + 3]
        cells = [f"{dense['tokens_per_second']:.1f}"]
        cells += [f"{row['tokens_per_second']:.1f} ({row['ratio']:.2f}×)" for row in pruned]
        assert f"| {name} | {' | '.join(cells)} |" in README


def test_pruning_seconds_are_those_of_the_files():
    for name in ("bench_prune_smollm2", "bench_prune_llama_1b"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        seconds = result["median_seconds"]
        row = f"| {seconds['original']:.1f} | {seconds['ours']:.1f} | {result['speed_up']:.2f}× |"
        assert row in README
        operations = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
        for part, figures in result["parts"].items():
            floor = figures["operations"] / result["gemm_operations_per_second"]["float32"]
            ratio = figures["seconds"] / floor
            assert f"| {part} | {figures['seconds']:.1f} | {floor:.1f} | {ratio:.2f} |" in operations


def test_quality_tables_are_those_of_the_file():
    from benchmarks.quality_table import loss_table, table

    record = json.loads((RESULTS / "bench_quality.json").read_text())
    assert table(record) in README
    assert loss_table(record) in README


def test_table_of_choices_is_that_of_the_file():
    from benchmarks.layer_choices import table

    assert table(json.loads((RESULTS / "layer_choices.json").read_text())) in README


def test_table_of_calibration_is_that_of_the_file():
    from benchmarks.bench_calibration import table

    assert table(json.loads((RESULTS / "bench_calibration.json").read_text())) in README


def test_table_of_beginnings_of_text_is_that_of_the_file():
    from benchmarks.text_starts import table

    assert table(json.loads((RESULTS / "text_starts.json").read_text())["rows"]) in README


def test_table_of_constants_is_that_of_the_file():
    from benchmarks.constants import table

    assert table(json.loads((RESULTS / "constants.json").read_text())["rows"]) in README
