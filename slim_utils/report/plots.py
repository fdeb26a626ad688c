"""What the figures of a report are made of: a plot and its section, bars, and perplexity against size."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from slim_utils.report.figures import BREAKDOWN, Bar, BarPanel, perplexity_figure, perplexity_panels

Rows = list[dict[str, Any]]

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


def bars(title: str, unit: str, runs: dict[str, list[float]], mean: Callable = statistics.mean) -> BarPanel:
    """A bar for each name, and its single runs where it has several."""
    bars = [Bar(name, mean(values), values if len(values) > 1 else ()) for name, values in runs.items()]
    return BarPanel(title, unit, bars)


def size_plots(name: str, title: str, rows: Rows) -> list[Plot]:
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
