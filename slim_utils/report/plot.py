"""A figure of the report, and what several kinds of source draw alike."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from slim_utils.report.figures import (
    BREAKDOWN,
    Bar,
    BarPanel,
    LayerLine,
    LayerPanel,
    perplexity_figure,
    perplexity_panels,
)
from slim_utils.report.sources import Rows

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


def text_perplexities(entries: Rows) -> dict[str, float]:
    """Perplexity by the label of text, window length and BOS."""
    return {
        f"{entry['dataset']}, {entry['seqlen']} tokens{', BOS' if entry.get('bos') else ''}": entry["perplexity"]
        for entry in entries
    }


def bar_panel(title: str, unit: str, runs: dict[str, list[float]], mean: Callable = statistics.mean) -> BarPanel:
    """A bar per name, with a dot for each run if there are several."""
    bars = [Bar(name, mean(values), values if len(values) > 1 else ()) for name, values in runs.items()]
    return BarPanel(title, unit, bars)


def size_plots(name: str, title: str, rows: Rows) -> list[Plot]:
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


def kept_panels(prefix: str, heads: list[LayerLine], widths: list[LayerLine]) -> list[LayerPanel]:
    """The panels of kept heads and of kept columns; their titles begin with ``prefix``."""
    return [
        LayerPanel(f"{prefix}query heads", "heads kept", heads, steps=True),
        LayerPanel(f"{prefix}FFN width", "columns kept", widths, steps=True),
    ]
