"""Which figures a report shows of every kind of source, and how each is titled, captioned and drawn."""

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
    SPEED,
    STARTS,
    Rows,
    Source,
    checked,
)

PEAK = "peak_memory_mib"  # Of a layer or a row: MiB by where.

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
        section: a key of ``SECTIONS``.
        name: of its file, without the ending; with the section it is unlike all others.
        title: in a few words.
        caption: what is to be seen, and what to know of it.
        draw: makes it.
    """

    section: str
    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def plots(sources: list[Source]) -> list[Plot]:
    """The figures of all sources, by section; pruning runs share theirs.

    Raises:
        UserError: naming the source that lacks something a file of its kind has.
    """
    runs = [source for source in sources if source.kind == RUN]
    found = checked(partial(_run_plots, runs), runs) if runs else []
    for source in sources:
        if source.kind != RUN:
            found += checked(partial(_PLOTS[source.kind], source), [source])
    return sorted(found, key=lambda plot: list(SECTIONS).index(plot.section))


def _run_plots(runs: list[Source]) -> list[Plot]:
    name, title = runs[0].slug if len(runs) == 1 else "runs", ", ".join(run.label for run in runs)
    found = []
    if any(run.masks for run in runs):
        left_out = [run.label for run in runs if not run.masks]
        caption = "Query heads and FFN columns that every layer keeps."
        caption += f" No pruning.json is beside the run.json of {', '.join(left_out)}." if left_out else ""
        found.append(Plot(KEPT, name, title, caption, partial(layer_figure, _mask_panels(runs))))
    caption = (
        "Error of the outputs of attention and MLP on the calibration samples, relative to what they were, with the "
        "removed weights zeroed and after compensation. Layers that lose nothing have none."
    )
    found.append(Plot(ERRORS, name, title, caption, partial(layer_figure, _error_panels(runs))))
    if searched := {index: run for index, run in enumerate(runs) if run.record.get("search")}:
        caption = (
            "KL divergence of the predictions from the dense model's where "
            f"{100 * REFERENCE_RATIO:g} % of the heads, or of "
            "the FFN columns, of one layer alone are removed; measured by the sensitivity analysis."
        )
        found.append(Plot(ERRORS, f"{name}_losses", title, caption, partial(layer_figure, _loss_panels(searched))))
    rows = [_run_row(run) for run in runs]
    found += _size_plots(name, title, rows)
    caption = "Seconds that every layer took, and the process's peak memory up to its end."
    found.append(Plot(COSTS, name, title, caption, partial(layer_figure, _cost_panels(runs))))
    return found


def _mask_panels(runs: list[Source]) -> list[LayerPanel]:
    """Of runs by their colour; the dense models, as many as differ, are levels."""
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
                values = _by_layer(run.record["layers"], part, f"error_{when}_compensation")
                lines.append(LayerLine(f"{run.label}, {when} compensation", values, index, dashed=when == "before"))
        panels.append(LayerPanel(title, "relative error (log scale)", lines, log=True))
    return panels


def _loss_panels(runs: dict[int, Source]) -> list[LayerPanel]:
    """Of runs by their colour."""
    panels = []
    for part, title in (("attention", "attention"), ("mlp", "MLP")):
        lines = []
        for index, run in runs.items():
            lines.append(LayerLine(run.label, _by_layer(run.record["search"], part, "loss"), index))
        panels.append(LayerPanel(title, "loss, nats a token (log scale)", lines, log=True))
    return panels


def _cost_panels(runs: list[Source]) -> list[LayerPanel]:
    seconds = [
        LayerLine(run.label, _by_layer(run.record["layers"], "seconds"), index) for index, run in enumerate(runs)
    ]
    panels = [LayerPanel("pruning", "seconds a layer", seconds)]
    for where in dict.fromkeys(where for run in runs for layer in run.record["layers"] for where in layer[PEAK]):
        memory = [
            LayerLine(run.label, _by_layer(run.record["layers"], PEAK, where), index) for index, run in enumerate(runs)
        ]
        panels.append(LayerPanel(f"peak memory, {where}", "MiB", memory))
    return panels


def _by_layer(layers: Rows, *keys: str) -> list[float]:
    """What there is under ``keys`` of every layer, from layer 0 on; NaN of those that have nothing there."""
    found = {}
    for layer in layers:
        value: Any = reduce(lambda inner, key: inner.get(key, math.nan), keys, layer)
        found[layer["layer"]] = math.nan if value is None else float(value)
    return [found.get(index, math.nan) for index in range(max(found, default=-1) + 1)]


def _run_row(run: Source) -> dict[str, Any]:
    """The run as a row of a benchmark; no text where it was not evaluated."""
    share, texts = run.record["sizes"]["block_share_removed"], _by_text(run.record.get("perplexity") or [])
    return {"heads": "", "method": run.label, "share": share, "perplexity": texts}


def _by_text(entries: Rows) -> dict[str, float]:
    return {
        f"{entry['dataset']}, {entry['seqlen']} tokens{', BOS' if entry.get('bos') else ''}": entry["perplexity"]
        for entry in entries
    }


def _bars(title: str, unit: str, runs: dict[str, list[float]], mean: Callable = statistics.mean) -> BarPanel:
    """A bar for each name, and its single runs where it has several."""
    bars = [Bar(name, mean(values), values if len(values) > 1 else ()) for name, values in runs.items()]
    return BarPanel(title, unit, bars)


def _size_plots(name: str, title: str, rows: Rows) -> list[Plot]:
    """Perplexity against size; nothing where no perplexity was measured."""
    panels = perplexity_panels(rows)
    caption = "Perplexity against the share of the attention and MLP weights that is gone"
    caption += "; mean and standard deviation over seeds." if len({row.get("seed") for row in rows}) > 1 else "."
    if any(panel.limit for panel in panels):
        caption += (
            f" A method that breaks down, beyond {BREAKDOWN} times the dense model's, is a triangle where the axis "
            "ends, with its perplexity."
        )
    return [Plot(SIZES, name, title, caption, partial(perplexity_figure, rows))] if panels else []


def _quality_plots(source: Source) -> list[Plot]:
    rows = source.record["rows"]
    found = _size_plots(source.slug, source.label, rows)
    for heads in dict.fromkeys(row["heads"] for row in rows):
        own = [row for row in rows if row["heads"] == heads and row["share"]]
        name, title = f"{source.slug}_{heads}", f"{source.label}, {heads.replace('_', ' ')} heads"
        profiled = [row for row in own if "profile" in row]
        if profiled:
            first = min(row["seed"] for row in profiled)
            panels = _profile_panels([row for row in profiled if row["seed"] == first])
            caption = f"Query heads and FFN columns that every layer keeps, method by method; seed {first}."
            found.append(Plot(KEPT, name, title, caption, partial(layer_figure, panels)))
        if own:
            caption = "Seconds of pruning alone, and peak memory of its process on the host; means, and a dot a seed."
            found.append(Plot(COSTS, name, title, caption, partial(bar_figure, _method_panels(own))))
    return found


def _profile_panels(rows: Rows) -> list[LayerPanel]:
    """Heads and columns at each share; methods that keep as much everywhere share a line."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = []
    for share in sorted({row["share"] for row in rows}):
        alike: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["share"] == share:
                alike.setdefault(str(row["profile"]), []).append(row)
        both: tuple[list[LayerLine], list[LayerLine]] = ([], [])
        for group in alike.values():
            label = "; ".join(_method_name(row) for row in group)
            for lines, values in zip(both, zip(*group[0]["profile"], strict=True), strict=True):
                lines.append(LayerLine(label, values, methods.index(group[0]["method"])))
        panels += _kept_panels(f"{100 * share:g} % removed: ", *both)
    return panels


def _kept_panels(start: str, heads: list[LayerLine], widths: list[LayerLine]) -> list[LayerPanel]:
    return [
        LayerPanel(f"{start}query heads", "heads kept", heads, steps=True),
        LayerPanel(f"{start}FFN width", "columns kept", widths, steps=True),
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
        start = f"{100 * share:g} % removed: "
        seconds = {name: [row["seconds"] for row in seeds] for name, seeds in methods.items()}
        memory = {name: [row[PEAK]["host"] for row in seeds] for name, seeds in methods.items()}
        panels += [_bars(f"{start}pruning", "seconds", seconds), _bars(f"{start}peak memory", "MiB", memory)]
    return panels


def _perplexity_plots(source: Source) -> list[Plot]:
    text, rows = source.record["protocol"]["eval_file"], []
    for row in source.record["rows"]:
        method = f"{row['heads'].replace('_', ' ')} heads"
        known = {"share_removed": row["share_removed"]} if "share_removed" in row else {}
        value = {"heads": "", "method": method, "share": row["share_asked"], "perplexity": {text: row["perplexity"]}}
        rows.append({**value, **known})
    return _size_plots(source.slug, source.label, rows)


def _recovery_plots(source: Source) -> list[Plot]:
    rows = []
    for row in source.record["rows"]:
        named = {"heads": "", "method": row["model"], "share": row.get("share_removed", 0)}
        rows.append({**named, "perplexity": _by_text(row["perplexity"])})
    return _size_plots(source.slug, source.label, rows)


def _perplexity_bars(caption: str, name: Callable[[dict[str, Any]], str], source: Source) -> list[Plot]:
    """A panel a text, with a bar a row, called ``name`` of it."""
    rows, panels = source.record["rows"], []
    for text in rows[0]["perplexity"]:
        figures = {name(row): [row["perplexity"][text]] for row in rows}
        panels.append(_bars(text, "perplexity", figures, statistics.median))
    return [Plot(SIZES, source.slug, source.label, caption, partial(bar_figure, panels))]


def _choice_plots(source: Source) -> list[Plot]:
    kinds: dict[str, dict[str, list[float]]] = {}
    for row in source.record["rows"]:
        kinds.setdefault(row["kind"], {}).setdefault(row["choice"], []).append(row["held_out"])
    panels = [_bars(kind, "error, held out", figures, statistics.geometric_mean) for kind, figures in kinds.items()]
    caption = "Error that choices inside a layer leave on tokens not fitted to; geometric means, and a dot a layer."
    return [Plot(ERRORS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _starts_plots(source: Source) -> list[Plot]:
    figures = {f"{100 * row['share']:g} %, {row['text_starts']}": [100 * row["lost"]] for row in source.record["rows"]}
    panels = [_bars("first tokens lost", "%", figures, statistics.median)]
    caption = "First tokens that are no longer attention sinks, by the share removed and the number of sink windows."
    return [Plot(ERRORS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _serving_plots(source: Source) -> list[Plot]:
    engines: dict[str, dict[str, list[float]]] = {}
    for row in source.record["rows"]:
        engines.setdefault(row["engine"], {})[row["model"]] = row["runs"]
    panels = [_bars(engine, "tokens a second", models, statistics.median) for engine, models in engines.items()]
    caption = "Tokens a second; medians, and a dot a run."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels, columns=3))]


def _pruning_cost_plots(source: Source) -> list[Plot]:
    ways = source.record["runs"]
    seconds = {way: [run["seconds"] for run in runs] for way, runs in ways.items()}
    panels = [_bars("pruning", "seconds", seconds, statistics.median)]
    for where in dict.fromkeys(where for runs in ways.values() for run in runs for where in run[PEAK]):
        memory = {way: [run[PEAK][where] for run in runs] for way, runs in ways.items()}
        panels.append(_bars(f"peak memory, {where}", "MiB", memory, statistics.median))
    caption = "Seconds of pruning alone, and peak memory of its process; medians, and a dot a run."
    return [Plot(COSTS, source.slug, source.label, caption, partial(bar_figure, panels))]


def _comparison_plots(source: Source) -> list[Plot]:
    models = {name: source.record[name] for name in ("dense", "pruned")}
    figures = {
        **{(text, "perplexity"): [one["perplexities"][text] for one in models.values()]
           for text in models["dense"]["perplexities"]},
        ("parameters", "millions"): [one["parameters"] / 1e6 for one in models.values()],
        ("multiply-accumulates", "billions"): [one["macs"] / 1e9 for one in models.values()],
        ("evaluation", "seconds"): [one["seconds"] for one in models.values()],
        ("peak memory, host", "MiB"): [one[PEAK]["host"] for one in models.values()],
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
        for part, unit in (("prefill", "milliseconds"), ("decode", "milliseconds a step")):
            runs = {model: [1e3 * seconds for seconds in latency[f"{part}_runs"]] for model, latency in pairs}
            panels.append(_bars(f"{setting}: {part}", unit, runs, statistics.median))
    caption = "Seconds of prefill and of a decoding step; medians, and a dot a run."
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
        "Perplexity of the same model pruned on other calibration data: text, samples × tokens.",
        lambda row: f"{row['text']}, {row['num_samples']} × {row['seqlen']}",
    ),
    CONSTANTS: partial(
        _perplexity_bars,
        "Perplexity of models pruned by a share with one default changed at a time.",
        lambda row: f"{row['model']}, {100 * row['share']:g} %, {row['variant']}",
    ),
    CHOICES: _choice_plots,
    STARTS: _starts_plots,
}
