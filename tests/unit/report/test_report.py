"""Sources and figures of a report."""

import json
import math
from pathlib import Path

import pytest

from scripts import report
from slim_utils.common.errors import UserError
from slim_utils.common.loading import PRUNED_MODEL_FOLDER
from slim_utils.report.contents import plots
from slim_utils.report.figures import BREAKDOWN, perplexity_figure, perplexity_panels
from slim_utils.report.page import page
from slim_utils.report.plot import COSTS, ERRORS, KEPT, SIZES
from slim_utils.report.sources import (
    CALIBRATION,
    CHOICES,
    COMPARISON,
    CONSTANTS,
    DISTILLATION_STEP,
    EXPERTS,
    PERPLEXITY,
    PRUNING_COST,
    QUALITY,
    RECOVERY,
    RECOVERY_CURVE,
    RUN,
    SERVING,
    SINKS,
    SOLVER,
    SPEED,
    raw_rows,
    read_sources,
)

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
KINDS = {
    "bench_quality": QUALITY,
    "bench_prune_smollm2": PRUNING_COST,
    "quickstart": COMPARISON,
    "quickstart_speed": SPEED,
    "serving_speed": SERVING,
    "smollm2_perplexity": PERPLEXITY,
    "smollm2_query_heads": PERPLEXITY,
    "smollm2_recovery": RECOVERY,
    "smollm2_distillation": RECOVERY,
    "smollm2_distillation_best": RECOVERY,
    "layer_choices": CHOICES,
    "bench_experts": EXPERTS,
    "bench_calibration": CALIBRATION,
    "text_starts": SINKS,
    "bench_distillation": DISTILLATION_STEP,
    "bench_recovery": RECOVERY_CURVE,
    "bench_recovery_bf16": RECOVERY_CURVE,
    "bench_recovery_zero_shot": RECOVERY_CURVE,
    "bench_search_cost": QUALITY,
    "constants": CONSTANTS,
    "constants_seed_1": CONSTANTS,
    "bench_solver": SOLVER,
    "bench_solver_11008": SOLVER,
}
PART = {"error_before_compensation": 0.2, "error_after_compensation": 0.1}
RUN_RECORD = {
    "command": "model_slimming.py <model> & more",
    "layers": [
        {"layer": index, "attention": PART, "mlp": PART, "seconds": 1.0, "peak_memory_mib": {"host": 9.0}}
        for index in (1, 2)
    ],
    "sizes": {"block_share_removed": 0.2},
    "pruning_seconds": 2.0,
}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def main(*arguments: object) -> None:
    report.main(report.build_parser().parse_args(list(map(str, arguments))))


def row(method: str, share: float, perplexity: dict[str, float], seed: int = 0) -> dict:
    return {"heads": "repeated", "method": method, "share": share, "seed": seed, "perplexity": perplexity}


@pytest.mark.parametrize("name", KINDS)
def test_read_sources_of_benchmark_results_recognises_their_kind(name):
    (source,) = read_sources([RESULTS / f"{name}.json"])
    assert (source.kind, source.label) == (KINDS[name], name)
    assert plots([source])
    assert all(raw_rows(source))


def test_plots_of_all_results_fill_every_section():
    sources = read_sources(sorted(RESULTS.glob("*.json")))
    assert {source.kind for source in sources} == set(KINDS.values())
    assert {plot.section for plot in plots(sources)} == {KEPT, ERRORS, SIZES, COSTS}


def test_plots_of_a_run_without_evaluation_have_no_perplexity(tmp_path):
    (source,) = read_sources([write(tmp_path / "out" / "run.json", RUN_RECORD).parent])
    assert (source.kind, source.label, source.masks) == (RUN, "out", None)
    assert [plot.section for plot in plots([source])] == [ERRORS, COSTS]


def test_plots_of_pruned_layers_keep_layer_numbers(tmp_path):
    """The record only has pruned layers."""
    (source,) = read_sources([write(tmp_path / "run.json", RUN_RECORD)])
    figure = plots([source])[0].draw()
    line = figure.axes[0].get_lines()[1]
    assert math.isnan(line.get_ydata()[0])
    assert line.get_ydata()[1:].tolist() == [0.1, 0.1]


def test_plots_of_a_run_without_pruned_layers_are_drawn(tmp_path):
    (source,) = read_sources([write(tmp_path / "run.json", {**RUN_RECORD, "layers": []})])
    for plot in plots([source]):
        plot.draw().canvas.draw()


def test_plots_of_a_sensitivity_analysis_draw_its_losses(tmp_path):
    search = [{"layer": i, "attention": {"loss": loss}, "mlp": {"loss": 0.5}} for i, loss in enumerate([0.25, None])]
    (source,) = read_sources([write(tmp_path / "run.json", {**RUN_RECORD, "search": search})])
    (plot,) = (plot for plot in plots([source]) if plot.name.endswith("_losses"))
    heads, columns = (ax.get_lines()[0].get_ydata().tolist() for ax in plot.draw().axes)
    assert heads[0] == 0.25 and math.isnan(heads[1]) and columns == [0.5, 0.5]


def test_plots_of_losses_of_later_layers_keep_layer_numbers(tmp_path):
    search = [{"layer": 2, "attention": {"loss": 0.25}, "mlp": {"loss": 0.5}}]
    (source,) = read_sources([write(tmp_path / "run.json", {**RUN_RECORD, "search": search})])
    (plot,) = (plot for plot in plots([source]) if plot.name.endswith("_losses"))
    values = plot.draw().axes[0].get_lines()[0].get_ydata().tolist()
    assert all(map(math.isnan, values[:2])) and values[2:] == [0.25]


def test_read_sources_with_equal_names_gives_distinct_labels(tmp_path):
    paths = [write(tmp_path / parent / "run.json", RUN_RECORD) for parent in ("a", "b")]
    assert [source.label for source in read_sources(paths)] == ["a", "b"]
    for parent in ("a", "b"):
        (tmp_path / parent / "out").mkdir()
    paths = [write(tmp_path / parent / "out" / "run.json", RUN_RECORD) for parent in ("a", "b")]
    assert len({source.label for source in read_sources(paths)}) == 2
    assert len(read_sources([paths[0], paths[0].parent])) == 1


UNREADABLE = {
    "missing": (None, "no such file or folder"),
    "broken": ('{"rows": [', "cannot be read as json"),
    "list": ([], "unknown kind"),
    "empty": ({}, "unknown kind"),
    "unknown": ({"rows": [{"loss": 1.0}]}, "unknown kind"),
    "no rows": ({"rows": []}, "unknown kind"),
    "run without its parts": ({**RUN_RECORD, "layers": [{"layer": 0}]}, "incomplete file of the kind"),
    "rows without figures": ({"rows": [row("flap", 0.2, {"c4": 9.0})]}, "incomplete file of the kind"),
    "damaged beside it": (RUN_RECORD, "pruning.json: not a pruning.json of this suite"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_report_of_an_unreadable_source_raises_one_line(case, tmp_path):
    content, message = UNREADABLE[case]
    path = tmp_path / "input" / "file.json"
    if content is not None:
        write(path, content)
    if case == "damaged beside it":
        write(tmp_path / "input" / "pruning.json", "{}")
    with pytest.raises(UserError) as error:
        main(path, "--out", tmp_path / "report")
    assert message in str(error.value)
    assert "input" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()


def test_read_sources_of_a_folder_without_run_json_is_refused(tmp_path):
    (tmp_path / PRUNED_MODEL_FOLDER).mkdir()
    with pytest.raises(UserError, match=r"no run\.json in this folder"):
        read_sources([tmp_path / PRUNED_MODEL_FOLDER])


def test_report_to_an_existing_folder_needs_overwrite_and_an_earlier_report(tmp_path):
    out, source = tmp_path / "report", RESULTS / "serving_speed.json"
    main(source, "--out", out)
    (out / "index.html").write_text("earlier", encoding="utf-8")
    with pytest.raises(UserError, match=r"--out .*--overwrite"):
        main(source, "--out", out)
    assert (out / "index.html").read_text(encoding="utf-8") == "earlier"
    main(source, "--out", out, "--overwrite")
    assert (out / "index.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    write(tmp_path / "other" / "index.html", "mine")
    with pytest.raises(UserError, match="not the output of an earlier run"):
        main(source, "--out", tmp_path / "other", "--overwrite")
    # A pruning run is not an earlier report either.
    write(tmp_path / "pruned" / "run.json", RUN_RECORD)
    with pytest.raises(UserError, match=r"not the output of an earlier run"):
        main(tmp_path / "pruned", "--out", tmp_path / "pruned", "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"report", "other", "pruned"}


def test_perplexity_panels_of_several_seeds_have_mean_and_deviation():
    rows = [row("dense", 0.0, {"c4": 10.0})]
    rows += [row("flap", 0.2, {"c4": value}, seed) for seed, value in enumerate((20.0, 30.0, 40.0))]
    (panel,) = perplexity_panels(rows)
    assert (panel.title, panel.dense, panel.limit) == ("c4", 10.0, None)
    assert panel.curves[0].points == [(20.0, 30.0, 10.0)]


@pytest.mark.parametrize("beyond", [11.0 * BREAKDOWN, math.inf, math.nan])
def test_perplexity_figure_of_a_broken_method_limits_the_axis(beyond):
    rows = [row("dense", 0.0, {"c4": 10.0}), row("magnitude", 0.2, {"c4": beyond}), row("flap", 0.2, {"c4": 20.0})]
    (panel,) = perplexity_panels(rows)
    assert panel.limit == 10.0 * BREAKDOWN
    (ax,) = perplexity_figure(rows).axes
    assert ax.get_ylim()[1] <= 3 * panel.limit
    assert f"{beyond:.2g}".replace("nan", "inf") in [text.get_text() for text in ax.texts]


def test_perplexity_figure_of_unknown_methods_and_texts_draws_them():
    rows = [row("dense", 0.0, {"c4": 10.0}), row("new_one", 0.2, {"c4": 20.0, "ptb": 30.0})]
    rows += [row("flap", 0.2, {"c4": 21.0}), {**row("flap", 0.2, {"ptb": 5.0}), "heads": "native"}]
    assert [panel.title for panel in perplexity_panels(rows)] == [
        "c4, repeated heads",
        "ptb, repeated heads",
        "ptb, native heads",
    ]
    figure = perplexity_figure(rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "FLAP", "new_one"]


def test_page_with_special_characters_in_labels_escapes_them(tmp_path):
    record = {**RUN_RECORD, "perplexity": [{"dataset": "<b>", "seqlen": 8, "perplexity": 3.0}]}
    sources = read_sources([write(tmp_path / name / "run.json", record) for name in ("_$a$<i>", "b" * 100)])
    drawn = [report.picture(plot) for plot in plots(sources)]
    legend = drawn[0].plot.draw().legends[0].get_texts()
    assert legend[0].get_text().strip().startswith("_$a$<i>")
    text = page(drawn, [(source, raw_rows(source)) for source in sources], "made")
    assert "<i>" not in text and "<b>" not in text
    assert "model_slimming.py &lt;model&gt; &amp; more" in text
    assert len(report.file_names(drawn * 2)) == len(set(report.file_names(drawn * 2)))


def test_perplexity_figure_of_more_methods_than_colours_has_distinct_styles():
    rows = [row("dense", 0.0, {"c4": 10.0}), *(row(f"method {i}", 0.2, {"c4": 20.0 + i}) for i in range(16))]
    handles = perplexity_figure(rows).legends[0].legend_handles
    styles = {(handle.get_color(), handle.get_marker(), handle.get_linestyle()) for handle in handles}
    assert len(styles) == 17


def test_plots_of_recovery_curves_have_one_colour_for_a_recovery_in_all_panels(tmp_path):
    def curve_row(share, recovery, tokens):
        return {"method": "best", "share": share, "recovery": recovery, "tokens": tokens, "perplexity": {"a": 20.0}}

    rows = [{"method": "dense", "share": 0.0, "recovery": "none", "tokens": 0, "perplexity": {"a": 10.0}}]
    rows += [curve_row(0.2, "KL, LoRA", 9), curve_row(0.5, "KL, scales", 9), curve_row(0.5, "KL, LoRA", 9)]
    (source,) = read_sources([write(tmp_path / "curve.json", {"rows": rows})])
    (plot,) = plots([source])
    of_share_20, _, of_share_50, *_ = [[line.get_color() for line in ax.get_lines()] for ax in plot.draw().axes]
    # KL, scales come first at 50 %.
    assert len(of_share_20) == 1 and len(of_share_50) == 2
    assert of_share_50[1] == of_share_20[0] != of_share_50[0]


def test_plots_of_recovery_curves_start_from_the_pruned_model(tmp_path):
    def curve_row(method, share, recovery, tokens, perplexity):
        seconds = {"training_seconds": tokens / 100} if tokens else {}
        row = {"method": method, "share": share, "recovery": recovery, "tokens": tokens, **seconds}
        return {**row, "perplexity": {"a": perplexity}}

    rows = [curve_row("dense", 0.0, "none", 0, 10.0), curve_row("best", 0.2, "none", 0, 20.0)]
    rows += [curve_row("best", 0.2, "KL, LoRA", tokens, 10 + 1000 / tokens) for tokens in (500, 200)]
    rows += [curve_row("dense", 0.0, "cross-entropy", 500, 9.9)]
    (source,) = read_sources([write(tmp_path / "curve.json", {"rows": rows})])
    assert source.kind == RECOVERY_CURVE
    (plot,) = plots([source])
    axes = plot.draw().axes
    assert [ax.get_xlabel() for ax in axes[:2]] == ["tokens", "seconds of training"]
    (line,) = axes[0].get_lines()
    assert line.get_xdata().tolist() == [0, 200, 500]
    assert line.get_ydata() == pytest.approx([math.log(2), math.log(1.5), math.log(1.2)])
    assert axes[1].get_lines()[0].get_xdata().tolist() == [0, 2, 5]
