"""Text and Markdown tables.

``tabulate`` is not used: it pads Markdown cells and has no minimum column width, so that the tables of different runs
would not line up.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

Row = tuple[str, float, *tuple[float, ...]]


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int] = ()) -> str:
    """Text table with columns two spaces apart; the first column is left-aligned, the others right-aligned.

    Args:
        headers: header cells; empty for no header.
        rows: cells of every row; short rows leave their last columns empty.
        widths: minimum width of each column.
    """
    lines = [headers, *rows] if headers else list(rows)
    columns = list(zip_longest(*lines, fillvalue=""))
    min_widths = [*widths, *[0] * (len(columns) - len(widths))]
    sizes = [max(width, *map(len, cells)) for cells, width in zip(columns, min_widths, strict=True)]
    aligned = ("  ".join(f"{cell:{'>' if i else '<'}{sizes[i]}}" for i, cell in enumerate(line)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def side_by_side(rows: Iterable[Row], headers: Sequence[str]) -> str:
    """Text table of rows (name, first value, second value, …), with the ratio of every other value to the first."""
    cells = []
    for row in rows:
        name, first, others = row[0], row[1], row[2:]
        ratios = chain.from_iterable((f"{value:.2f}", f"{value / first:.3f}") for value in others)
        cells.append((name, f"{first:.2f}", *ratios))
    titles = chain.from_iterable((header, "ratio") for header in headers[1:])
    return text_table(("", headers[0], *titles), cells, widths=(0, 9, *[9, 6] * (len(headers) - 1)))


def markdown_table(headers: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Markdown table with cells formatted by ``str``."""
    heading = "".join(f"| {header} " if header else "| " for header in headers)
    lines = [f"{heading}|", "|---" * len(headers) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join(lines)
