"""Tables and figures of README and docs/ against the result files that they come from."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from ppl_eval.zero_shot import ACC_NORM_IN_PAPERS
from slim_utils.obs import solve_bytes

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


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
    from benchmarks.bench_recovery import table, zero_shot_table

    rows, bf16, zero_shot = (
        json.loads((RESULTS / f"bench_recovery{part}.json").read_text())["rows"] for part in ("", "_bf16", "_zero_shot")
    )
    gemma = json.loads((RESULTS / "bench_recovery_gemma.json").read_text())["rows"]
    assert all(table(part) in TABLES for part in (rows, bf16, gemma)) and zero_shot_table(zero_shot) in TABLES
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
