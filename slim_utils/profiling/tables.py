"""Tables of text and of Markdown.

``tabulate`` is not used: it pads Markdown cells to columns and has no least width of a column, so that tables of
different runs would not line up.
"""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

Row = tuple[str, float, float]


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int] = ()) -> str:
    """Columns two spaces apart, each as wide as its widest cell; the first is aligned left, the others right.

    Args:
        headers: first line; empty for none.
        rows: cells of every line; a short row leaves its last columns empty.
        widths: least width of each column.
    """
    lines = [headers, *rows] if headers else list(rows)
    columns = list(zip_longest(*lines, fillvalue=""))
    least = [*widths, *[0] * (len(columns) - len(widths))]
    fitted = [max(width, *map(len, cells)) for cells, width in zip(columns, least, strict=True)]
    aligned = ("  ".join(f"{cell:{'>' if i else '<'}{fitted[i]}}" for i, cell in enumerate(line)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def side_by_side(rows: Iterable[Row], headers: tuple[str, str]) -> str:
    """Rows of (name, figure of the first model, figure of the second), with the ratio of the second to the first."""
    cells = [(name, f"{first:.2f}", f"{second:.2f}", f"{second / first:.3f}") for name, first, second in rows]
    return text_table(("", *headers, "ratio"), cells, widths=(0, 9, 9, 6))


def markdown_table(headers: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown, its cells as ``str`` gives them."""
    heading = "".join(f"| {header} " if header else "| " for header in headers)
    lines = [f"{heading}|", "|---" * len(headers) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join(lines)
