"""Figures of a report for each kind of source: titles, captions and drawing."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from matplotlib.figure import Figure

from slim_utils.allocation.sensitivity import REFERENCE_RATIO
from slim_utils.report.figures import (
    BREAKDOWN,
    Bar,
    BarPanel,
    LayerLine,
    LayerPanel,
    bar_figure,
    layer_figure,
    perplexity_figure,
    perplexity_panels,
)
from slim_utils.report.sources import (
    CALIBRATION,
    CHOICES,
    COMPARISON,
    CONSTANTS,
    METHOD_NAMES,
    PERPLEXITY,
    PRUNING_COST,
    QUALITY,
    RECOVERY,
    RUN,
    SERVING,
    SINKS,
    SPEED,
    Rows,
    Source,
    require_complete,
)

PEAK = "peak_memory_mib"  # Key of a layer or a row: MiB by "host" and "gpu".

KEPT, ERRORS, SIZES, COSTS = "kept", "error", "perplexity", "cost"
SECTIONS = {
    KEPT: "Kept heads and widths",
    ERRORS: "Error and loss by layer",
    SIZES: "Perplexity against size",
    COSTS: "Speed and memory",
}


@dataclass(frozen=True)
class Plot:
    """One figure of the report.

    Attributes:
        section: key of ``SECTIONS``.
        name: file name without suffix.
        title: short title.
        caption: description of the figure.
        draw: function that draws the figure.
    """

    section: str
    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def plots(sources: list[Source]) -> list[Plot]:
    """Figures of all sources, ordered by section; all pruning runs are drawn in the same figures.

    Raises:
        UserError: naming the source that is incomplete.
    """
    runs = [source for source in sources if source.kind == RUN]
    all_plots = require_complete(partial(_run_plots, runs), runs) if runs else []
    for source in sources:
        if source.kind != RUN:
            all_plots += require_complete(partial(_PLOTS[source.kind], source), [source])
    return sorted(all_plots, key=lambda plot: list(SECTIONS).index(plot.section))


def _run_plots(runs: list[Source]) -> list[Plot]:
    name, title = runs[0].slug if len(runs) == 1 else "runs", ", ".join(run.label for run in runs)
    run_plots = []
    if any(run.masks for run in runs):
        unmasked = [run.label for run in runs if not run.masks]
        caption = "Query heads and FFN columns kept in every layer."
        caption += f" Not shown, for lack of a pruning.json: {', '.join(unmasked)}." if unmasked else ""
        run_plots.append(Plot(KEPT, name, title, caption, partial(layer_figure, _mask_panels(runs))))
    caption = (
        "Relative error of the outputs of attention and MLP on the calibration samples, with the pruned weights zeroed "
        "and after compensation. Unpruned layers have no values."
    )
    run_plots.append(Plot(ERRORS, name, title, caption, partial(layer_figure, _error_panels(runs))))
    if analysed := {index: run for index, run in enumerate(runs) if run.record.get("search")}:
        caption = (
            "Sensitivity analysis: KL divergence of the predictions from those of the dense model with "
            f"{100 * REFERENCE_RATIO:g} % of the heads, or of the FFN columns, of a single layer removed."
        )
        run_plots.append(Plot(ERRORS, f"{name}_losses", title, caption, partial(layer_figure, _loss_panels(analysed))))
    rows = [_run_row(run) for run in runs]
    run_plots += _size_plots(name, title, rows)
    caption = "Seconds per layer, and peak memory of the process up to the end of each layer."
    run_plots.append(Plot(COSTS, name, title, caption, partial(layer_figure, _cost_panels(runs))))
    return run_plots


def _mask_panels(runs: list[Source]) -> list[LayerPanel]:
    """Panels of kept heads and widths, one colour per run; every distinct dense model is a dashed line."""
    masks_of = {index: run.masks for index, run in enumerate(runs) if run.masks}
    kept: list[list[LayerLine]] = []
    for size, kept_size in (
        ("num_heads", lambda mask: len(mask.kept_heads)),
        ("ffn_width", lambda mask: mask.kept_width),
    ):
        dense = dict.fromkeys(tuple(getattr(mask.shape, size) for mask in masks) for masks in masks_of.values())
        lines = [LayerLine(METHOD_NAMES["dense"], values, None, dashed=True) for values in dense]
        lines += [LayerLine(runs[index].label, list(map(kept_size, masks)), index) for index, masks in masks_of.items()]
        kept.append(lines)
    return _kept_panels("", *kept)


def _error_panels(runs: list[Source]) -> list[LayerPanel]:
    panels = []
    for part, title in (("attention", "attention"), ("mlp", "MLP")):
        lines = []
        for index, run in enumerate(runs):
            for when in ("before", "after"):
                values = _layer_values(run.record["layers"], part, f"error_{when}_compensation")
                lines.append(LayerLine(f"{run.label}, {when} compensation", values, index, dashed=when == "before"))
        panels.append(LayerPanel(title, "relative error (log scale)", lines, log=True))
    return panels


def _loss_panels(runs: dict[int, Source]) -> list[LayerPanel]:
    """Panels of measured sensitivities; ``runs`` by colour index."""
    panels = []
    for part, title in (("attention", "attention"), ("mlp", "MLP")):
        lines = []
        for index, run in runs.items():
            lines.append(LayerLine(run.label, _layer_values(run.record["search"], part, "loss"), index))
        panels.append(LayerPanel(title, "KL divergence, nats per token (log scale)", lines, log=True))
    return panels


def _cost_panels(runs: list[Source]) -> list[LayerPanel]:
    seconds = [
        LayerLine(run.label, _layer_values(run.record["layers"], "seconds"), index) for index, run in enumerate(runs)
    ]
    panels = [LayerPanel("pruning", "seconds per layer", seconds)]
    for memory in dict.fromkeys(memory for run in runs for layer in run.record["layers"] for memory in layer[PEAK]):
        peaks = [
            LayerLine(run.label, _layer_values(run.record["layers"], PEAK, memory), index)
            for index, run in enumerate(runs)
        ]
        panels.append(LayerPanel(f"peak memory, {memory}", "MiB", peaks))
    return panels


def _layer_values(layers: Rows, *keys: str) -> list[float]:
    """Values under the nested ``keys`` of the layers, from layer 0 on; NaN for layers without a value."""
    values = {}
    for layer in layers:
        value: Any = reduce(lambda inner, key: inner.get(key, math.nan), keys, layer)
        values[layer["layer"]] = math.nan if value is None else float(value)
    return [values.get(index, math.nan) for index in range(max(values, default=-1) + 1)]


def _run_row(run: Source) -> dict[str, Any]:
    """The run as a row of a benchmark; ``perplexity`` is empty if the run was not evaluated."""
    share, texts = run.record["sizes"]["block_share_removed"], _text_perplexities(run.record.get("perplexity") or [])
    return {"heads": "", "method": run.label, "share": share, "perplexity": texts}


def _text_perplexities(entries: Rows) -> dict[str, float]:
    """Perplexity by the label of text, window length and BOS."""
    return {
        f"{entry['dataset']}, {entry['seqlen']} tokens{', BOS' if entry.get('bos') else ''}": entry["perplexity"]
        for entry in entries
    }


def _bar_panel(title: str, unit: str, runs: dict[str, list[float]], mean: Callable = statistics.mean) -> BarPanel:
    """A bar per name, with a dot for each run if there are several."""
    bars = [Bar(name, mean(values), values if len(values) > 1 else ()) for name, values in runs.items()]
    return BarPanel(title, unit, bars)


def _size_plots(name: str, title: str, rows: Rows) -> list[Plot]:
    """The figure of perplexity against size; empty if no perplexity was measured."""
    panels = perplexity_panels(rows)
    caption = "Perplexity against the share of the attention and MLP weights removed"
    caption += "; mean and standard deviation over seeds." if len({row.get("seed") for row in rows}) > 1 else "."
    if any(panel.limit for panel in panels):
        caption += (
            f" Perplexities beyond {BREAKDOWN} times that of the dense model are shown as triangles at the end of the "
            "axis, with their value."
        )
    return [Plot(SIZES, name, title, caption, partial(perplexity_figure, rows))] if panels else []


def _quality_plots(source: Source) -> list[Plot]:
    rows = source.record["rows"]
    quality_plots = _size_plots(source.slug, source.label, rows)
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
        panels += _kept_panels(f"{100 * share:g} % removed: ", head_lines, width_lines)
    return panels


def _kept_panels(prefix: str, heads: list[LayerLine], widths: list[LayerLine]) -> list[LayerPanel]:
    return [
        LayerPanel(f"{prefix}query heads", "heads kept", heads, steps=True),
        LayerPanel(f"{prefix}FFN width", "columns kept", widths, steps=True),
    ]


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
        panels.append(_bar_panel(f"{prefix}pruning", "seconds", seconds))
        panels.append(_bar_panel(f"{prefix}peak memory", "MiB", memory))
    return panels


def _perplexity_plots(source: Source) -> list[Plot]:
    text, rows = source.record["protocol"]["eval_file"], []
    for row in source.record["rows"]:
        method = f"{row['heads'].replace('_', ' ')} heads"
        achieved = {"share_removed": row["share_removed"]} if "share_removed" in row else {}
        value = {"heads": "", "method": method, "share": row["share_asked"], "perplexity": {text: row["perplexity"]}}
        rows.append({**value, **achieved})
    return _size_plots(source.slug, source.label, rows)


def _recovery_plots(source: Source) -> list[Plot]:
    rows = []
    for row in source.record["rows"]:
        model = {"heads": "", "method": row["model"], "share": row.get("share_removed", 0)}
        rows.append({**model, "perplexity": _text_perplexities(row["perplexity"])})
    return _size_plots(source.slug, source.label, rows)


def _perplexity_bars(caption: str, name: Callable[[dict[str, Any]], str], source: Source) -> list[Plot]:
    """A figure with one panel per text and one bar per row, labelled ``name(row)``."""
    rows, panels = source.record["rows"], []
    for text in rows[0]["perplexity"]:
        figures = {name(row): [row["perplexity"][text]] for row in rows}
        panels.append(_bar_panel(text, "perplexity", figures, statistics.median))
    return [Plot(SIZES, source.slug, source.label, caption, partial(bar_figure, panels))]


def _choice_plots(source: Source) -> list[Plot]:
    kinds: dict[str, dict[str, list[float]]] = {}
    for row in source.record["rows"]:
        kinds.setdefault(row["kind"], {}).setdefault(row["choice"], []).append(row["held_out"])
    mean = statistics.geometric_mean
    panels = [_bar_panel(kind, "error, held out", figures, mean) for kind, figures in kinds.items()]
    caption = "Error on held-out tokens, by choices within a layer; geometric means, with a dot per layer."
    return [Plot(ERRORS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _sink_plots(source: Source) -> list[Plot]:
    figures = {f"{100 * row['share']:g} %, {row['text_starts']}": [100 * row["lost"]] for row in source.record["rows"]}
    panels = [_bar_panel("first tokens lost", "%", figures, statistics.median)]
    caption = "First tokens that are no longer attention sinks, by share removed and number of sink windows."
    return [Plot(ERRORS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _serving_plots(source: Source) -> list[Plot]:
    engines: dict[str, dict[str, list[float]]] = {}
    for row in source.record["rows"]:
        engines.setdefault(row["engine"], {})[row["model"]] = row["runs"]
    panels = [_bar_panel(engine, "tokens per second", models, statistics.median) for engine, models in engines.items()]
    caption = "Tokens per second; medians, with a dot per run."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels, columns=3))]


def _pruning_cost_plots(source: Source) -> list[Plot]:
    procedures = source.record["runs"]
    seconds = {name: [run["seconds"] for run in runs] for name, runs in procedures.items()}
    panels = [_bar_panel("pruning", "seconds", seconds, statistics.median)]
    for memory in dict.fromkeys(memory for runs in procedures.values() for run in runs for memory in run[PEAK]):
        peaks = {name: [run[PEAK][memory] for run in runs] for name, runs in procedures.items()}
        panels.append(_bar_panel(f"peak memory, {memory}", "MiB", peaks, statistics.median))
    caption = "Seconds of pruning (without loading and saving) and peak memory; medians, with a dot per run."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _comparison_plots(source: Source) -> list[Plot]:
    models = {name: source.record[name] for name in ("dense", "pruned")}
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
    caption = "Two models side by side: perplexities, size, and seconds and peak memory of the evaluation."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _speed_plots(source: Source) -> list[Plot]:
    panels = []
    for timing in source.record["timings"]:
        setting = f"batch {timing['batch_size']}, {timing['length']} tokens"
        pairs = list(zip(source.record["models"], timing["latencies"], strict=True))
        for part, unit in (("prefill", "milliseconds"), ("decode", "milliseconds per step")):
            runs = {model: [1e3 * seconds for seconds in latency[f"{part}_runs"]] for model, latency in pairs}
            panels.append(_bar_panel(f"{setting}: {part}", unit, runs, statistics.median))
    caption = "Latency of prefill and of a decoding step; medians, with a dot per run."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))] if panels else []


_PLOTS: dict[str, Callable[[Source], list[Plot]]] = {
    QUALITY: _quality_plots,
    SERVING: _serving_plots,
    PRUNING_COST: _pruning_cost_plots,
    COMPARISON: _comparison_plots,
    SPEED: _speed_plots,
    PERPLEXITY: _perplexity_plots,
    RECOVERY: _recovery_plots,
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
    CHOICES: _choice_plots,
    SINKS: _sink_plots,
}
