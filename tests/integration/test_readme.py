"""README, docs/ and CONTRIBUTING against the files, flags, commands and result files that they name."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields
from itertools import product
from pathlib import Path, PurePosixPath

import pytest
import torch

import model_evaluate
import model_slimming
import test_flops
from ppl_eval.zero_shot import ACC_NORM_IN_PAPERS
from scripts import report
from slim_utils.obs import solve_bytes
from train_utils import finetune_args, finetune_checks

ROOT = Path(__file__).resolve().parents[2]
README_LIMIT = 15_000
# Texts by path: pages for users, then all documents.
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = PAGES["docs/results.md"]
PAGES["README.md"] = README
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = PAGES | {"CONTRIBUTING.md": CONTRIBUTING}
for folder in ("benchmarks", "benchmarks/results"):
    DOCUMENTS[f"{folder}/README.md"] = (ROOT / folder / "README.md").read_text(encoding="utf-8")
# The page, or the section of a page, that lists the flags of a script.
FLAG_LISTS: dict[tuple[str, str], Callable[[], argparse.ArgumentParser]] = {
    ("docs/prune.md", ""): model_slimming.build_parser,
    ("docs/evaluate.md", "Zero-shot tasks"): model_evaluate.build_parser,
    ("docs/evaluate.md", "Count and time"): test_flops.build_parser,
}
# Pages that name flags of a single script without listing them all.
ONE_SCRIPT = {
    ("docs/recover.md", ""): finetune_args.build_parser,
    ("docs/large-models.md", ""): model_slimming.build_parser,
}
# Flags of torchrun, of accelerate, of vLLM and of the recipes.
EXTERNAL_FLAGS = {
    "--num_processes",
    "--nproc_per_node",
    "--nnodes",
    "--rdzv_backend",
    "--rdzv_endpoint",
    "--model-impl",
    "--trust-remote-code",
}
EXTERNAL_FLAGS |= {"--smoke"}
RESULTS = ROOT / "benchmarks" / "results"


def commands(start: str) -> list[str]:
    """Commands of the pages' bash blocks that begin with ``start``, line continuations joined."""
    blocks = [block for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(start)]


def arguments_of(command: str, script: str) -> list[str]:
    """Arguments that ``command`` gives to ``script``, without its redirections."""
    argv = shlex.split(command.partition("2>&1")[0])
    return argv[argv.index(script) + 1 :]


def test_pruning_commands_as_shown_are_parsed():
    lines = commands("python model_slimming.py")
    lines += [line for line in commands("torchrun") if "model_slimming.py" in line]
    assert len(lines) == 9
    for command in lines:
        args = model_slimming.build_parser().parse_args(arguments_of(command, "model_slimming.py"))
        assert args.save_dir == "OUT"


@pytest.mark.parametrize(("script", "count"), [(model_evaluate, 2), (test_flops, 4)])
def test_measuring_commands_as_shown_are_parsed(script, count):
    lines = commands(f"python {script.__name__}.py")
    assert len(lines) == count
    for command in lines:
        script.build_parser().parse_args(shlex.split(command)[2:])


def test_evaluation_commands_of_several_processes_as_shown_are_parsed():
    lines = [line for line in commands("torchrun") + commands("accelerate") if "model_evaluate.py" in line]
    assert len(lines) == 2
    for command in lines:
        model_evaluate.build_parser().parse_args(arguments_of(command, "model_evaluate.py"))


def test_report_command_as_shown_is_parsed():
    (command,) = commands("python -m scripts.report")
    args = report.build_parser().parse_args(shlex.split(command)[3:])
    assert (len(args.runs), args.out) == (3, Path("report"))


def test_fine_tuning_commands_as_shown_are_parsed(monkeypatch):
    monkeypatch.setattr(finetune_args, "provide_single_process_group", lambda argv: None)
    sharing = [line for line in commands("torchrun") if "model_finetune.py" in line]
    short_commands = commands("python model_finetune.py")
    assert (len(sharing), len(short_commands)) == (3, 2)
    for command in (*sharing, *short_commands):
        arguments = arguments_of(command, "model_finetune.py")
        for flag in ("--deepspeed", "--fsdp", "--fsdp_config"):
            if flag in arguments:
                # Left out: it would need a process group.
                index = arguments.index(flag)
                assert flag == "--fsdp" or (ROOT / arguments[index + 1]).is_file()
                del arguments[index : index + 2]
        args = finetune_args.parse_args(arguments)
        assert args.model.use_lora != bool(args.data.train_text) and args.training.output_dir == "SFT"


def test_recipe_commands_as_shown_set_variables_of_the_recipe():
    lines = commands("MODEL=") + commands("NPROC=")
    assert len(lines) == 8
    for text in PAGES.values():
        for command in re.findall(r"^.*bash scripts/\w+\.sh$", text, flags=re.MULTILINE):
            *variables, _, script = shlex.split(command)
            recipe = (ROOT / script).read_text(encoding="utf-8")
            for variable in variables:
                assert f"{variable.partition('=')[0]}=${{" in recipe, command


@pytest.mark.parametrize("page", DOCUMENTS)
def test_files_named_in_a_document_exist(page):
    folders = "configs|models|slim_utils|train_utils|ppl_eval|scripts|benchmarks|tests|docs"
    for path in re.findall(rf"(?<![\w./])(?:{folders})/[\w/.-]+\.(?:sh|py|json|md|png|svg)", DOCUMENTS[page]):
        # Paths relative to the page are allowed too.
        assert (ROOT / path).is_file() or (ROOT / page).parent.joinpath(path).is_file() or "NAME" in path, path
    for module in re.findall(r"python -m ([\w.]+)", DOCUMENTS[page]):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def named_flags(text: str) -> set[str]:
    """Flags that ``text`` names."""
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))


def section(page: str, title: str) -> str:
    """The text of ``page``, or of its second-level section ``title``."""
    if not title:
        return PAGES[page]
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return text


def parser_flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def test_named_flags_in_mixed_text_are_whole():
    assert named_flags("`--min_sparsity A`, (--max) x--y ---z --a-b=3") == {"--min_sparsity", "--max", "--a-b"}


@pytest.mark.parametrize("place", FLAG_LISTS)
def test_flags_of_a_script_are_all_listed_on_its_page(place):
    assert parser_flags(FLAG_LISTS[place]()) <= named_flags(section(*place))


def test_flags_of_fine_tuning_are_all_listed_unless_refused():
    named = named_flags(PAGES["docs/recover.md"])
    for group in (finetune_args.ModelArguments, finetune_args.DataArguments, finetune_args.SparseArguments):
        for option in fields(group):
            assert (f"--{option.name}" in named) != (option.name in finetune_checks.REFUSED_FLAGS), option.name


@pytest.mark.parametrize("place", FLAG_LISTS | ONE_SCRIPT)
def test_flags_named_on_the_page_of_a_script_exist(place):
    known = (FLAG_LISTS | ONE_SCRIPT)[place]
    assert named_flags(section(*place)) - EXTERNAL_FLAGS <= parser_flags(known()) | set(finetune_args.RENAMED_FLAGS)


@pytest.mark.parametrize("page", DOCUMENTS)
def test_flags_named_in_a_document_are_those_of_a_script(page):
    flags = parser_flags(finetune_args.build_parser()) | set(finetune_args.RENAMED_FLAGS) | EXTERNAL_FLAGS
    flags = flags.union(*(parser_flags(build()) for build in FLAG_LISTS.values()))
    for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]:
        flags |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    for path in ROOT.glob("scripts/*.sh"):
        flags |= set(re.findall(r"^ +(--\w+)\)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named_flags(DOCUMENTS[page]) <= flags


def test_readme_size_is_within_its_limit():
    assert len(README.encode()) <= README_LIMIT


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def link_targets(text: str) -> list[str]:
    """Targets of the links and images of a Markdown text, except those to other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_code(text)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> list[str]:
    """Anchors of the headings of a Markdown text, as GitHub makes them."""
    slugs: list[str] = []
    for heading in re.findall(r"^#+ +(.*?) *$", without_code(text), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{slug}(-\d+)?", other) is not None for other in slugs)
        slugs.append(f"{slug}-{repeated}" if repeated else slug)
    return slugs


def test_link_targets_in_mixed_text_leave_out_code_and_sites():
    text = "[a](b.md#c) ![d](e/f.png) [g](https://h.org) `[i](j)`\n```\n[k](l)\n```\n[m](#n)"
    assert link_targets(text) == ["b.md#c", "e/f.png", "#n"]


def test_anchors_of_headings_are_those_of_github():
    text = "# A b\n```\n# no\n```\n## `--c`, d: (e)\n## A b\n"
    assert anchors(text) == ["a-b", "--c-d-e", "a-b-1"]


@pytest.mark.parametrize("page", DOCUMENTS)
def test_relative_links_of_a_document_resolve(page):
    for target in link_targets(DOCUMENTS[page]):
        path, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert linked.is_relative_to(ROOT) and linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_pages_of_docs_are_all_linked_from_readme():
    linked = {target.partition("#")[0] for target in link_targets(README)}
    assert set(PAGES) - {"README.md"} <= linked


def file_tree() -> dict[str, str]:
    """Descriptions in README's file tree by path; folders end in a slash."""
    (block,) = re.findall(r"^## Repository\n+```\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    lines: dict[str, str] = {}
    parents: list[str] = []
    for indent, name, described in re.findall(r"^( *)(\S+) *(.*)$", block, flags=re.MULTILINE):
        del parents[len(indent) // 2 :]
        lines["".join([*parents, name])] = described
        parents.append(name)
    return lines


def top_level_folders() -> set[str]:
    """Tracked top-level folders that are not hidden; all folders on disk without git."""
    paths = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"]
    if shutil.which("git"):
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
        tracked = {PurePosixPath(path).parts[0] for path in listed.splitlines()}
        paths = [path for path in paths if path in tracked or not tracked]
    return {path for path in paths if not path.startswith(".")}


def packages() -> set[str]:
    """Packages in ``slim_utils/``."""
    return {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("slim_utils/*/__init__.py")}


def test_paths_of_the_file_tree_exist_and_are_described():
    for path, described in file_tree().items():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
        assert described, path


def test_top_level_folders_and_packages_are_all_in_the_file_tree():
    assert {f"{path}/" for path in top_level_folders() | packages()} <= set(file_tree())
    assert {path.name for path in ROOT.glob("*.py")} <= set(file_tree())


def test_modules_in_the_table_of_contributing_exist():
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", CONTRIBUTING, flags=re.MULTILINE)
    assert packages() | {"slim_utils", "train_utils", "ppl_eval", "models"} <= {folder for folder, _ in rows}
    for folder, modules in rows:
        for module in re.findall(r"`([\w/]+\.py)`", modules):
            assert (ROOT / folder / module).is_file() or (ROOT / module).is_file(), f"{folder}/{module}"


def test_perplexity_table_is_that_of_the_files():
    rows = json.loads((RESULTS / "smollm2_perplexity.json").read_text())["rows"]
    rows += json.loads((RESULTS / "smollm2_query_heads.json").read_text())["rows"][1:]
    names = {"repeated": "multi-head", "native": "kv groups", "native_query_head": "query heads"}
    for row in rows:
        share, parameters = row.get("share_removed", 0), row["parameters"] / 1e6
        line = f"| {names[row['heads']]} | {100 * share:.1f} % | {parameters:.1f} M | {row['perplexity']:.2f} |"
        assert line in TABLES


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
        assert f"| {name} | {a:.2f} | {b:.2f} | {b / a:.3f} |" in TABLES


def test_quick_start_table_is_that_of_the_file():
    from scripts.compare_models import table

    result = json.loads((RESULTS / "quickstart.json").read_text())
    assert table({name: result[name] for name in ("dense", "pruned")}) in README


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
        assert f"| {row['model']} | {share} | {' | '.join(figures)} |" in TABLES


def test_serving_table_is_that_of_the_file():
    rows = json.loads((RESULTS / "serving_speed.json").read_text())["rows"]
    names = {
        "transformers": "Transformers",
        "vllm": "vLLM",
        "vllm, plugin": "vLLM, plugin",
        "llama.cpp": "llama.cpp, f16",
    }
    for engine in dict.fromkeys(row["engine"] for row in rows):
        cells = {row["model"]: f"{row['tokens_per_second']:.1f}" for row in rows if row["engine"] == engine}
        ratios = {row["model"]: f" ({row['ratio']:.2f}×)" for row in rows if row["engine"] == engine}
        shown = [cells.get("dense", "")]
        shown += [cells.get(name, "") + ratios.get(name, "") for name in ("pruned, per layer", "pruned, stock")]
        assert f"| {names[engine]} | {' | '.join(shown)} |" in TABLES


def test_pruning_seconds_are_those_of_the_files():
    for name in ("bench_prune_smollm2", "bench_prune_llama_1b"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        seconds = result["median_seconds"]
        row = f"| {seconds['original']:.1f} | {seconds['ours']:.1f} | {result['speed_up']:.2f}× |"
        assert row in TABLES
        operations = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
        for part, figures in result["parts"].items():
            floor = figures["operations"] / result["gemm_operations_per_second"]["float32"]
            ratio = figures["seconds"] / floor
            assert f"| {part} | {figures['seconds']:.1f} | {floor:.1f} | {ratio:.2f} |" in operations


def test_quality_tables_are_those_of_the_file():
    from benchmarks.quality_table import loss_table, table

    record = json.loads((RESULTS / "bench_quality.json").read_text())
    assert table(record) in TABLES
    assert loss_table(record) in TABLES


def test_table_of_the_cost_of_search_is_that_of_the_file():
    from benchmarks.quality_table import METHOD_NAMES

    rows = json.loads((RESULTS / "bench_search_cost.json").read_text())["rows"]
    plain = next(row["seconds"] for row in rows if row["method"] == "slimgpt_log_increase")
    for row in rows:
        if row["share"]:
            cells = [f"{row['seconds']:.0f}", f"{row['seconds'] / plain:.1f}×"]
            cells += [f"{value:.2f}" for value in row["perplexity"].values()]
            assert f"| {METHOD_NAMES[row['method']]} | {' | '.join(cells)} |" in TABLES


def test_quality_table_of_readme_is_that_of_the_file():
    from benchmarks.quality_table import METHOD_NAMES, group_rows, mean_and_std

    rows = group_rows(json.loads((RESULTS / "bench_quality.json").read_text()))

    def cell(share: float, method: str) -> str:
        return mean_and_std([row["perplexity"]["wikitext2"] for row in rows["native", share, method]], ".2f")

    assert f"(dense: {cell(0.0, 'dense')})" in README
    for method in ("wanda_sp", "flap", "slimgpt_uniform", "slimgpt_log_increase", "best"):
        cells = [cell(share, method) for share in (0.2, 0.33, 0.5)]
        assert f"| {METHOD_NAMES[method]} | {' | '.join(cells)} |" in README


def test_table_of_choices_is_that_of_the_file():
    from benchmarks.layer_choices import table

    assert table(json.loads((RESULTS / "layer_choices.json").read_text())) in TABLES


def test_table_of_calibration_is_that_of_the_file():
    from benchmarks.bench_calibration import table

    assert table(json.loads((RESULTS / "bench_calibration.json").read_text())) in TABLES


def test_table_of_whole_experts_is_that_of_the_file():
    from benchmarks.bench_experts import table

    assert table(json.loads((RESULTS / "bench_experts.json").read_text())) in TABLES


def test_table_of_sink_windows_is_that_of_the_file():
    from benchmarks.text_starts import table

    assert table(json.loads((RESULTS / "text_starts.json").read_text())["rows"]) in TABLES


def test_table_of_recovery_is_that_of_the_file():
    from benchmarks.bench_recovery import table

    rows, bf16 = (
        json.loads((RESULTS / file).read_text())["rows"] for file in ("bench_recovery.json", "bench_recovery_bf16.json")
    )
    assert table(rows) in TABLES and table(bf16) in TABLES
    shown = [row for row in rows if (row["method"], row["share"]) == ("best", 0.2) and row["tokens"] in (0, 100_000)]
    best = {row["recovery"]: row for row in shown if not row.get("learning_rate")}
    before, after = (best[name]["perplexity"]["wikitext2"] for name in ("none", "KL, block weights"))
    assert f"from {before:.2f} to\n{after:.2f} on these cores" in README


def test_table_of_a_distillation_step_is_that_of_the_file():
    for row in json.loads((RESULTS / "bench_distillation.json").read_text())["rows"]:
        cells = [row["way"], f"{row['seconds']:.1f}", f"{row['tokens_per_second']:.0f}", str(row["peak_memory_mib"])]
        assert f"| {' | '.join(cells)} |" in TABLES


def test_table_of_the_solver_is_that_of_the_file():
    from benchmarks.bench_solver import table

    files = ("bench_solver.json", "bench_solver_11008.json")
    assert table([row for file in files for row in json.loads((RESULTS / file).read_text())["rows"]]) in TABLES


def test_table_of_constants_is_that_of_the_file():
    from benchmarks.constants import table

    assert table(json.loads((RESULTS / "constants.json").read_text())["rows"]) in TABLES


def test_memory_of_the_solver_in_the_docs_is_that_of_its_formula():
    rows = re.findall(r"\((\d+) → (\d+)\) \| ([\d.]+) \| ([\d.]+) \|", (ROOT / "docs" / "large-models.md").read_text())
    assert len(rows) == 3
    for columns, outputs, *promised in rows:
        for dtype, gib in zip((torch.float64, torch.float32), promised, strict=True):
            size = solve_bytes(int(columns), int(outputs), int(columns) // 4, dtype)
            assert f"{size / 2**30:.1f}" == gib
