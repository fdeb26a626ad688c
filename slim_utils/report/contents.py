"""Figures of a report: those of all pruning runs together, and those of each benchmark result."""

import math
from functools import partial, reduce
from typing import Any

from slim_utils.allocation.sensitivity import REFERENCE_RATIO
from slim_utils.report.benchmark_plots import BENCHMARK_PLOTS
from slim_utils.report.figures import LayerLine, LayerPanel, layer_figure
from slim_utils.report.plot import COSTS, ERRORS, KEPT, PEAK, SECTIONS, Plot, kept_panels, size_plots, text_perplexities
from slim_utils.report.sources import (
    METHOD_NAMES,
    RUN,
    Rows,
    Source,
    require_complete,
)


def plots(sources: list[Source]) -> list[Plot]:
    """Figures of all sources, ordered by section; all pruning runs are drawn in the same figures.

    Raises:
        UserError: naming the source that is incomplete.
    """
    runs = [source for source in sources if source.kind == RUN]
    all_plots = require_complete(partial(_run_plots, runs), runs) if runs else []
    for source in sources:
        if source.kind != RUN:
            all_plots += require_complete(partial(BENCHMARK_PLOTS[source.kind], source), [source])
    return sorted(all_plots, key=lambda plot: list(SECTIONS).index(plot.section))


def _run_plots(runs: list[Source]) -> list[Plot]:
    name, title = runs[0].slug if len(runs) == 1 else "runs", ", ".join(run.label for run in runs)
    run_plots = []
    if any(run.masks for run in runs):
        unmasked = [run.label for run in runs if not run.masks]
        caption = "Query heads and FFN columns, and experts where whole ones are removed, kept in every layer."
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
    run_plots += size_plots(name, title, rows)
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
        ("num_experts", lambda mask: len(mask.kept_experts)),
    ):
        dense = dict.fromkeys(tuple(getattr(mask.shape, size) for mask in masks) for masks in masks_of.values())
        lines = [LayerLine(METHOD_NAMES["dense"], values, None, dashed=True) for values in dense]
        lines += [LayerLine(runs[index].label, list(map(kept_size, masks)), index) for index, masks in masks_of.items()]
        kept.append(lines)
    heads, widths, experts = kept
    panels = kept_panels("", heads, widths)
    if any(mask.plan.experts for masks in masks_of.values() for mask in masks):
        panels.append(LayerPanel("experts", "experts kept", experts, steps=True))
    return panels


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
    share, texts = run.record["sizes"]["block_share_removed"], text_perplexities(run.record.get("perplexity") or [])
    return {"heads": "", "method": run.label, "share": share, "perplexity": texts}
