"""Figures of a report: lines by layer, perplexity against size, bars.

Every function returns a new ``matplotlib`` figure; nothing is shown and no global setting of the library is changed.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from slim_utils.report.sources import METHOD_NAMES

# The colour-blind safe palette of Okabe and Ito; yellow, faint on white, comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
DENSE, INK = "#7A7F87", "#24292F"
# Perplexity axes end at this multiple of the dense model's perplexity if a method exceeds it.
BREAKDOWN = 100
DPI = 144
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#B4BAC2",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.12,
    "font.size": 9.5,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.6,
    "text.color": INK,
    # Dollar signs in paths are literal.
    "text.parse_math": False,
    "xtick.color": "#57606A",
    "xtick.labelcolor": INK,
    "ytick.color": "#57606A",
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class LayerLine:
    """A line with one value per layer, NaN for none; log axes also skip values that are not positive.

    Attributes:
        label: label in the legend.
        values: values from layer 0 on.
        colour: index into ``COLOURS``, or ``None`` for the grey of the dense model.
        dashed: whether the line is dashed.
    """

    label: str
    values: Sequence[float]
    colour: int | None
    dashed: bool = False


@dataclass(frozen=True)
class LayerPanel:
    """Lines over the layers of a model; ``unit`` is the label of the y axis."""

    title: str
    unit: str
    lines: list[LayerLine]
    log: bool = False
    steps: bool = False


@dataclass(frozen=True)
class PointLine:
    """A line through points (x, y).

    Attributes:
        label: label in the legend.
        points: the points, in order.
        colour: index into ``COLOURS``.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int


@dataclass(frozen=True)
class PointPanel:
    """Lines through points; ``x_unit`` and ``unit`` are the labels of the axes."""

    title: str
    x_unit: str
    unit: str
    lines: list[PointLine]


@dataclass(frozen=True)
class Bar:
    """One bar; ``runs`` are its individual measurements, drawn as dots."""

    label: str
    value: float
    runs: Sequence[float] = ()


@dataclass(frozen=True)
class BarPanel:
    """Bars on one axis; ``unit`` is its label."""

    title: str
    unit: str
    bars: list[Bar]


@dataclass(frozen=True)
class Curve:
    """Points (share removed in %, mean perplexity, standard deviation over seeds) of one method."""

    method: str
    points: list[tuple[float, float, float]]


@dataclass(frozen=True)
class PerplexityPanel:
    """Curves of one evaluation text.

    Attributes:
        title: the text, and the kind of attention if there are several.
        dense: perplexity of the dense model; ``None`` if it was not measured.
        curves: curves of the methods.
        limit: end of the axis, ``BREAKDOWN`` times the perplexity of the dense model (or the lowest mean); ``None`` if
            no mean exceeds it.
    """

    title: str
    dense: float | None
    curves: list[Curve]
    limit: float | None


@rc_context(STYLE)
def layer_figure(panels: list[LayerPanel]) -> Figure:
    """Figure of ``panels``, two per row, with a shared legend."""
    figure, axes = _grid(len(panels), columns=2, size=(4.9, 2.9))
    handles: dict[str, Artist] = {}
    for ax, panel in zip(axes, panels, strict=True):
        ax.set(title=panel.title, xlabel="layer", ylabel=panel.unit)
        for line in panel.lines:
            values = [value if value > 0 or not panel.log else math.nan for value in line.values]
            (handle,) = ax.plot(
                values,
                color=_colour(line.colour),
                linestyle=_dashes(line.colour or 0, line.dashed),
                drawstyle="steps-mid" if panel.steps else "default",
                marker=None if panel.steps or line.colour is None else _marker(line.colour),
                markersize=3.5,
            )
            handles.setdefault(line.label, handle)
        ax.set_xlim(-0.5, max(1, *(len(line.values) for line in panel.lines)) - 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.log:
            _log_axis(ax)
        else:
            # Leaves room above, also if all values are equal.
            ax.set_ylim(0, 1.08 * max((value for line in panel.lines for value in line.values if value > 0), default=1))
    _legend(figure, handles)
    return figure


@rc_context(STYLE)
def point_figure(panels: list[PointPanel], columns: int = 3) -> Figure:
    """Figure of ``panels``, ``columns`` per row, with a shared legend."""
    figure, axes = _grid(len(panels), columns, size=(9.8 / columns, 2.9))
    handles: dict[str, Artist] = {}
    for ax, panel in zip(axes, panels, strict=True):
        ax.set(title=panel.title, xlabel=panel.x_unit, ylabel=panel.unit)
        for line in panel.lines:
            x, y = zip(*line.points, strict=True)
            style: dict[str, Any] = {"linestyle": _dashes(line.colour), "marker": _marker(line.colour)}
            (handle,) = ax.plot(x, y, color=_colour(line.colour), markersize=3.5, **style)
            handles.setdefault(line.label, handle)
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    _legend(figure, handles)
    return figure


@rc_context(STYLE)
def bar_figure(panels: list[BarPanel], columns: int = 2) -> Figure:
    """Figure of horizontal bars, ``columns`` panels per row; panels of a row share their labels if they are equal."""
    max_bars = max(len(panel.bars) for panel in panels)
    figure, axes = _grid(len(panels), columns, size=(9.8 / columns, 0.95 + 0.34 * max_bars))
    for index, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        ax.set(title=panel.title, xlabel=panel.unit)
        labels = [bar.label for bar in panel.bars]
        colours = [_colour(None if label == METHOD_NAMES["dense"] else 0) for label in labels]
        ax.barh(range(len(labels)), [bar.value for bar in panel.bars], color=colours, height=0.66)
        for row, bar in enumerate(panel.bars):
            ax.plot(bar.runs, [row] * len(bar.runs), "o", color=INK, markersize=2.8, alpha=0.7)
            end = max([bar.value, *bar.runs])
            ax.annotate(_number(bar.value), (end, row), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
        left_panel = panels[index - 1] if index % columns else None
        repeated = left_panel is not None and labels == [bar.label for bar in left_panel.bars]
        ax.set_yticks(range(len(labels)), [""] * len(labels) if repeated else list(map(_shorten, labels)))
        ax.set_ylim(len(labels) - 0.4, -0.6)
        ax.margins(x=0.16)
        ax.set_xlim(left=0)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
    return figure


def perplexity_panels(rows: Iterable[dict[str, Any]]) -> list[PerplexityPanel]:
    """A panel for every kind of attention and evaluation text of ``rows``, in their order.

    Args:
        rows: rows as in the results of ``bench_quality.py``: ``heads``, ``method``, ``share`` (0 for the dense model),
            ``perplexity`` by the name of the text, and ``share_removed`` if known. Rows with the same heads, method
            and share differ in their seed.
    """
    rows = list(rows)
    kinds, texts = (list(dict.fromkeys(names)) for names in ((row["heads"] for row in rows), _texts(rows)))
    panels = []
    for heads in kinds:
        for text in texts:
            panel_rows = [row for row in rows if row["heads"] == heads and text in row["perplexity"]]
            if panel_rows:
                title = text if len(kinds) == 1 else f"{text}, {heads.replace('_', ' ')} heads"
                panels.append(_perplexity_panel(title, text, panel_rows))
    return panels


@rc_context(STYLE)
def perplexity_figure(rows: Iterable[dict[str, Any]], names: dict[str, str] = METHOD_NAMES) -> Figure:
    """Figure of perplexity against the share removed, one panel per text, one line per method, the dense model dashed.

    Args:
        rows: rows as for :func:`perplexity_panels`.
        names: labels of methods, in the order of the legend; other methods follow under their own names.
    """
    rows = list(rows)
    panels = perplexity_panels(rows)
    row_methods = list(dict.fromkeys(row["method"] for row in rows if row["share"]))
    methods = [name for name in names if name in row_methods] + [name for name in row_methods if name not in names]
    figure, axes = _grid(len(panels), columns=_columns(rows, len(panels)), size=(4.6, 3.7))
    handles: dict[str, Artist] = {}
    for ax, panel in zip(axes, panels, strict=True):
        ax.set(title=panel.title, xlabel="block weights removed (%)", ylabel="perplexity (log scale)")
        if panel.dense is not None:
            handles["dense"] = ax.axhline(panel.dense, color=DENSE, linestyle="--", linewidth=1.2)
        off_axis: dict[int, int] = {}
        for curve in sorted(panel.curves, key=lambda curve: methods.index(curve.method)):
            style = methods.index(curve.method)
            _draw_curve(ax, curve, panel, style, off_axis)
            handles.setdefault(names.get(curve.method, curve.method), _curve_handle(style))
        _log_axis(ax)
        if panel.limit is not None:
            ax.set_ylim(top=2 * panel.limit)
        ax.margins(x=0.08)
    order = ["dense", *(names.get(method, method) for method in methods)]
    _legend(figure, {label: handles[label] for label in order if label in handles})
    return figure


def _columns(rows: list[dict[str, Any]], panels: int) -> int:
    """Panels per row: one row per kind of attention, or rows of two or three."""
    texts = len(set(_texts(rows)))
    return texts if texts <= 3 else 2 if panels == 4 else 3


def _texts(rows: list[dict[str, Any]]) -> Iterable[str]:
    return (text for row in rows for text in row["perplexity"])


def _perplexity_panel(title: str, text: str, rows: list[dict[str, Any]]) -> PerplexityPanel:
    dense = [row["perplexity"][text] for row in rows if not row["share"]]
    groups: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["share"]:
            groups.setdefault(row["method"], {}).setdefault(row["share"], []).append(row)
    curves = []
    for method, shares in groups.items():
        points = []
        for share, seeds in sorted(shares.items()):
            values = [row["perplexity"][text] for row in seeds]
            removed = statistics.mean(row.get("share_removed", share) for row in seeds)
            several = len(values) > 1 and all(map(math.isfinite, values))
            mean = statistics.mean(values) if all(map(math.isfinite, values)) else math.inf
            points.append((100 * removed, mean, statistics.stdev(values) if several else 0.0))
        curves.append(Curve(method, points))
    means = [mean for curve in curves for _, mean, _ in curve.points]
    limit = BREAKDOWN * min(dense or means)
    exceeded = any(mean > limit for mean in means)
    return PerplexityPanel(title, statistics.mean(dense) if dense else None, curves, limit if exceeded else None)


def _draw_curve(ax: Axes, curve: Curve, panel: PerplexityPanel, style: int, off_axis: dict[int, int]) -> None:
    """Draw one method; ``off_axis`` counts the points beyond the axis at each share, whose values are stacked."""
    colour, limit = _colour(style), panel.limit or math.inf
    start = [(0.0, panel.dense, 0.0)] if panel.dense is not None else []
    points = [*start, *curve.points]
    # The line ends at the first point beyond the axis.
    visible = next((index + 1 for index, (_, mean, _) in enumerate(points) if mean > limit), len(points))
    ax.plot(
        [x for x, _, _ in points[:visible]],
        [min(mean, limit) for _, mean, _ in points[:visible]],
        _dashes(style),
        color=colour,
    )
    inside = [point for point in curve.points if point[1] <= limit]
    if inside:
        shares, means, deviations = zip(*inside, strict=True)
        # On a log axis, error bars must not reach zero.
        below = [min(deviation, 0.9 * mean) for mean, deviation in zip(means, deviations, strict=True)]
        bars = (below, deviations) if any(deviations) else None
        ax.errorbar(shares, means, bars, fmt=_marker(style), color=colour, markersize=5.5, capsize=3, linewidth=1.1)
    for share, mean, _ in curve.points:
        if mean > limit:
            ax.plot(share, limit, marker="^", color=colour, markersize=8, clip_on=False)
            position = off_axis[round(share)] = off_axis.get(round(share), 0) + 1
            ax.annotate(
                f"{mean:.2g}", (share, limit), (0, 11 * position - 1), textcoords="offset points",
                ha="center", va="center", color=colour, fontsize=8.5,
            )  # fmt: skip


def _curve_handle(style: int) -> Artist:
    return Line2D([], [], color=_colour(style), linestyle=_dashes(style), marker=_marker(style), markersize=5.5)


def _grid(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes, ``columns`` per row, each of ``size`` in inches."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width = max(6.0, columns * size[0])
    figure = Figure(figsize=(width, rows * size[1]), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _legend(figure: Figure, handles: dict[str, Artist]) -> None:
    """Add a legend below the axes and make the figure taller by its height."""
    width, height = figure.get_size_inches()
    # matplotlib skips labels that start with an underscore.
    labels = [_shorten(label) if label[0] != "_" else f" {_shorten(label)}" for label in handles]
    max_length = max(map(len, labels))
    columns = max(1, min(len(labels), int(width / (0.7 + 0.085 * max_length))))
    figure.set_size_inches(width, height + 0.15 + 0.22 * math.ceil(len(labels) / columns))
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns)


def _log_axis(ax: Axes) -> None:
    """Set a log scale with as many plain tick labels as fit."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 6:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.yaxis.set_minor_locator(NullLocator())
    elif high / low < 200:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _colour(index: int | None) -> str:
    return DENSE if index is None else COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    """Marker of a line; changes each time the colours repeat."""
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _dashes(index: int, dashed: bool = False) -> str:
    """Line style of a line; changes each time the colours repeat."""
    return (("-", "--"), ("-.", ":"))[index // len(COLOURS) % 2][dashed]


def _number(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _shorten(label: str, max_length: int = 60) -> str:
    return label if len(label) <= max_length else f"{label[: max_length // 2]}…{label[-max_length // 2 :]}"
