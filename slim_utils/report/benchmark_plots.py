"""Figures of every kind of benchmark result."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from slim_utils.report.figures import (
    Bar,
    BarPanel,
    LayerLine,
    LayerPanel,
    PointLine,
    PointPanel,
    bar_figure,
    layer_figure,
    point_figure,
)
from slim_utils.report.plot import (
    COSTS,
    ERRORS,
    KEPT,
    PEAK,
    SIZES,
    Plot,
    bar_panel,
    kept_panels,
    size_plots,
    text_perplexities,
)
from slim_utils.report.sources import (
    CALIBRATION,
    CHOICES,
    COMPARED,
    COMPARISON,
    CONSTANTS,
    DISTILLATION_STEP,
    EXPERTS,
    METHOD_NAMES,
    PERPLEXITY,
    PRUNING_COST,
    QUALITY,
    RECOVERY,
    RECOVERY_CURVE,
    SERVING,
    SINKS,
    SOLVER,
    SPEED,
    Rows,
    Source,
)


def _quality_plots(source: Source) -> list[Plot]:
    rows = source.record["rows"]
    quality_plots = size_plots(source.slug, source.label, rows)
    for heads in dict.fromkeys(row["heads"] for row in rows):
        pruned_rows = [row for row in rows if row["heads"] == heads and row["share"]]
        name, title = f"{source.slug}_{heads}", f"{source.label}, {heads.replace('_', ' ')} heads"
        profile_rows = [row for row in pruned_rows if "profile" in row]
        if profile_rows:
            seed = min(row["seed"] for row in profile_rows)
            panels = _profile_panels([row for row in profile_rows if row["seed"] == seed])
            caption = f"Query heads and FFN columns kept in every layer, by method; seed {seed}."
            quality_plots.append(Plot(KEPT, name, title, caption, partial(layer_figure, panels)))
        if pruned_rows:
            caption = "Seconds of pruning (without evaluation) and peak host memory; means, with a dot per seed."
            quality_plots.append(Plot(COSTS, name, title, caption, partial(bar_figure, _method_panels(pruned_rows))))
    return quality_plots


def _profile_panels(rows: Rows) -> list[LayerPanel]:
    """Panels of kept heads and columns at each share; methods with the same profile share a line."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = []
    for share in sorted({row["share"] for row in rows}):
        same_profile: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["share"] == share:
                same_profile.setdefault(str(row["profile"]), []).append(row)
        head_lines: list[LayerLine] = []
        width_lines: list[LayerLine] = []
        for profile_rows in same_profile.values():
            label = "; ".join(_method_name(row) for row in profile_rows)
            heads, widths = zip(*profile_rows[0]["profile"], strict=True)
            colour = methods.index(profile_rows[0]["method"])
            head_lines.append(LayerLine(label, heads, colour))
            width_lines.append(LayerLine(label, widths, colour))
        panels += kept_panels(f"{100 * share:g} % removed: ", head_lines, width_lines)
    return panels


def _method_name(row: dict[str, Any]) -> str:
    return METHOD_NAMES.get(row["method"], str(row["method"]))


def _method_panels(rows: Rows) -> list[BarPanel]:
    panels = []
    for share in sorted({row["share"] for row in rows}):
        methods: dict[str, Rows] = {}
        for row in rows:
            if row["share"] == share:
                methods.setdefault(_method_name(row), []).append(row)
        prefix = f"{100 * share:g} % removed: "
        seconds = {name: [row["seconds"] for row in seeds] for name, seeds in methods.items()}
        memory = {name: [row[PEAK]["host"] for row in seeds] for name, seeds in methods.items()}
        panels.append(bar_panel(f"{prefix}pruning", "seconds", seconds))
        panels.append(bar_panel(f"{prefix}peak memory", "MiB", memory))
    return panels


def _perplexity_plots(source: Source) -> list[Plot]:
    text, rows = source.record["protocol"]["eval_file"], []
    for row in source.record["rows"]:
        method = f"{row['heads'].replace('_', ' ')} heads"
        achieved = {"share_removed": row["share_removed"]} if "share_removed" in row else {}
        value = {"heads": "", "method": method, "share": row["share_asked"], "perplexity": {text: row["perplexity"]}}
        rows.append({**value, **achieved})
    return size_plots(source.slug, source.label, rows)


def _recovery_plots(source: Source) -> list[Plot]:
    rows = []
    for row in source.record["rows"]:
        model = {"heads": "", "method": row["model"], "share": row.get("share_removed", 0)}
        rows.append({**model, "perplexity": text_perplexities(row["perplexity"])})
    return size_plots(source.slug, source.label, rows)


def _perplexity_bars(caption: str, name: Callable[[dict[str, Any]], str], source: Source) -> list[Plot]:
    """A figure with one panel per text and one bar for the rows of each ``name(row)``."""
    rows, panels = source.record["rows"], []
    for text in rows[0]["perplexity"]:
        figures: dict[str, list[float]] = {}
        for row in rows:
            figures.setdefault(name(row), []).append(row["perplexity"][text])
        panels.append(bar_panel(text, "perplexity", figures, statistics.median))
    return [Plot(SIZES, source.slug, source.label, caption, partial(bar_figure, panels))]


def _curve_plots(source: Source) -> list[Plot]:
    rows = source.record["rows"]
    texts = next(row["perplexity"] for row in rows if row["method"] == "dense" and not row["tokens"])
    # A recovery has one colour in all panels.
    labels = dict.fromkeys(_recovery_label(row) for row in rows if row["recovery"] != "none" and row["share"])
    colours = {label: index for index, label in enumerate(labels)}
    panels = []
    for share in sorted({row["share"] for row in rows if row["share"]}):
        for key, unit in (("tokens", "tokens"), ("training_seconds", "seconds of training")):
            for text, dense in texts.items():
                lines = _loss_lines([row for row in rows if row["share"] == share], text, dense, key, colours)
                if lines:
                    title = f"{text}, {100 * share:g} % removed"
                    panels.append(PointPanel(title, unit, "loss over dense (nats)", lines))
    caption = "Increase of ln perplexity over the dense model, by tokens and by seconds of recovery training."
    return [Plot(SIZES, source.slug, source.label, caption, partial(point_figure, panels))] if panels else []


def _recovery_label(row: dict[str, Any]) -> str:
    rate = f", {row['learning_rate']:g}" if row.get("learning_rate") else ""
    return f"{row['method']}, {row['recovery']}{rate}"


def _loss_lines(rows: Rows, text: str, dense: float, key: str, colours: dict[str, int]) -> list[PointLine]:
    """A line of the loss on ``text`` against the cost ``key`` for every pruned model and recovery of one share.

    Every line starts from the model before recovery.
    """
    starts: dict[str, list[tuple[float, float]]] = {}
    trained: dict[str, list[tuple[float, float]]] = {}
    methods = {_recovery_label(row): row["method"] for row in rows}
    for row in rows:
        point = row.get(key, 0), math.log(row["perplexity"][text] / dense)
        if row["recovery"] == "none":
            starts[row["method"]] = [point]
        else:
            trained.setdefault(_recovery_label(row), []).append(point)
    return [
        PointLine(label, [*starts.get(methods[label], []), *sorted(points)], colours[label])
        for label, points in trained.items()
    ]


def _solver_plots(source: Source) -> list[Plot]:
    panels = []
    for row in source.record["rows"]:
        seconds = {way: [run["seconds"] for run in runs] for way, runs in row["runs"].items()}
        seconds["floor"] = [row["floor_seconds"]]
        panels.append(bar_panel(f"{row['columns']} columns, {row['dtype']}", "seconds", seconds, statistics.median))
    caption = "Seconds of solving one map of an FFN, and the time of its operations at the rate of a matrix product."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _distillation_plots(source: Source) -> list[Plot]:
    units = {"seconds": "seconds of a step", PEAK: "MiB"}
    panels = [
        bar_panel(
            key.replace("_mib", "").replace("_", " "), unit, {row["way"]: [row[key]] for row in source.record["rows"]}
        )
        for key, unit in units.items()
    ]
    caption = "A training step with a teacher: seconds of forward and backward, and peak memory."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _choice_plots(source: Source) -> list[Plot]:
    kinds: dict[str, dict[str, list[float]]] = {}
    for row in source.record["rows"]:
        kinds.setdefault(row["kind"], {}).setdefault(row["choice"], []).append(row["held_out"])
    mean = statistics.geometric_mean
    panels = [bar_panel(kind, "error, held out", figures, mean) for kind, figures in kinds.items()]
    caption = "Error on held-out tokens, by choices within a layer; geometric means, with a dot per layer."
    return [Plot(ERRORS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _sink_plots(source: Source) -> list[Plot]:
    figures = {f"{100 * row['share']:g} %, {row['text_starts']}": [100 * row["lost"]] for row in source.record["rows"]}
    panels = [bar_panel("first tokens lost", "%", figures, statistics.median)]
    caption = "First tokens that are no longer attention sinks, by share removed and number of sink windows."
    return [Plot(ERRORS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _serving_plots(source: Source) -> list[Plot]:
    engines: dict[str, dict[str, list[float]]] = {}
    for row in source.record["rows"]:
        engines.setdefault(row["engine"], {})[row["model"]] = row["runs"]
    panels = [bar_panel(engine, "tokens per second", models, statistics.median) for engine, models in engines.items()]
    caption = "Tokens per second; medians, with a dot per run."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels, columns=3))]


def _pruning_cost_plots(source: Source) -> list[Plot]:
    procedures = source.record["runs"]
    seconds = {name: [run["seconds"] for run in runs] for name, runs in procedures.items()}
    panels = [bar_panel("pruning", "seconds", seconds, statistics.median)]
    for memory in dict.fromkeys(memory for runs in procedures.values() for run in runs for memory in run[PEAK]):
        peaks = {name: [run[PEAK][memory] for run in runs] for name, runs in procedures.items()}
        panels.append(bar_panel(f"peak memory, {memory}", "MiB", peaks, statistics.median))
    caption = "Seconds of pruning (without loading and saving) and peak memory; medians, with a dot per run."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _comparison_plots(source: Source) -> list[Plot]:
    models = {name: source.record[name] for name in COMPARED if name in source.record}
    figures = {
        **{(text, "perplexity"): [model["perplexities"][text] for model in models.values()]
           for text in models["dense"]["perplexities"]},
        ("parameters", "millions"): [model["parameters"] / 1e6 for model in models.values()],
        ("multiply-accumulates", "billions"): [model["macs"] / 1e9 for model in models.values()],
        ("evaluation", "seconds"): [model["seconds"] for model in models.values()],
        ("peak memory, host", "MiB"): [model[PEAK]["host"] for model in models.values()],
    }  # fmt: skip
    panels = [
        BarPanel(title.removeprefix("perplexity "), unit, [Bar(*pair) for pair in zip(models, values, strict=True)])
        for (title, unit), values in figures.items()
    ]
    caption = "Models side by side: perplexities, size, and seconds and peak memory of the evaluation."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _speed_plots(source: Source) -> list[Plot]:
    panels = []
    for timing in source.record["timings"]:
        setting = f"batch {timing['batch_size']}, {timing['length']} tokens"
        pairs = list(zip(source.record["models"], timing["latencies"], strict=True))
        for part, unit in (("prefill", "milliseconds"), ("decode", "milliseconds per step")):
            runs = {model: [1e3 * seconds for seconds in latency[f"{part}_runs"]] for model, latency in pairs}
            panels.append(bar_panel(f"{setting}: {part}", unit, runs, statistics.median))
    caption = "Latency of prefill and of a decoding step; medians, with a dot per run."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))] if panels else []


BENCHMARK_PLOTS: dict[str, Callable[[Source], list[Plot]]] = {
    QUALITY: _quality_plots,
    SERVING: _serving_plots,
    PRUNING_COST: _pruning_cost_plots,
    COMPARISON: _comparison_plots,
    SPEED: _speed_plots,
    PERPLEXITY: _perplexity_plots,
    RECOVERY: _recovery_plots,
    RECOVERY_CURVE: _curve_plots,
    SOLVER: _solver_plots,
    DISTILLATION_STEP: _distillation_plots,
    CALIBRATION: partial(
        _perplexity_bars,
        "Perplexity of the same model by calibration data: text, samples × tokens.",
        lambda row: f"{row['text']}, {row['num_samples']} × {row['seqlen']}",
    ),
    CONSTANTS: partial(
        _perplexity_bars,
        "Perplexity of pruned models with one default changed at a time.",
        lambda row: f"{row['model']}, {100 * row['share']:g} %, {row['variant']}",
    ),
    EXPERTS: partial(
        _perplexity_bars,
        "Perplexity of a tiny mixture of experts at equal size, by the unit of removal; medians, with a dot per draw.",
        lambda row: f"{100 * row['share']:.0f} %, {row['unit']}",
    ),
    CHOICES: _choice_plots,
    SINKS: _sink_plots,
}
