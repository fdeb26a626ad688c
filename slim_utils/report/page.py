"""The page of a report: one HTML file that asks for nothing else, from the template beside this module."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slim_utils.report.contents import SECTIONS, Plot
from slim_utils.report.sources import Rows, Source, flat

TEMPLATE = "report.html.j2"
# Of what a file says beside its rows, these come first; the others are in the command or in the rows.
_FIRST_FACTS = ("command", "seed", "versions", "hardware")
_NO_FACTS = ("arguments", "prompt", "dense", "pruned", "models", "runs")


@dataclass(frozen=True)
class Picture:
    """A figure as it was drawn: the bytes of its PNG, and its width and height in pixels of the page."""

    plot: Plot
    png: bytes
    width: int
    height: int

    @property
    def base64(self) -> str:
        """The PNG as text."""
        return base64.b64encode(self.png).decode("ascii")


def page(pictures: list[Picture], sources: list[tuple[Source, Rows]], made_by: str) -> str:
    """The whole page.

    Args:
        pictures: by section.
        sources: with their numbers.
        made_by: the command and the versions that made it.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["plain"] = _text
    drawn = {picture.plot.section for picture in pictures}
    return environment.get_template(TEMPLATE).render(
        names=", ".join(source.label for source, _ in sources),
        sections={key: title for key, title in SECTIONS.items() if key in drawn},
        pictures=pictures,
        articles=[_article(source, rows) for source, rows in sources],
        made_by=made_by,
    )


def _article(source: Source, rows: Rows) -> dict[str, Any]:
    """What the template shows of a source; the table has a column for every name that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {"label": source.label, "facts": list(_facts(source)), "columns": columns, "rows": rows}


def _facts(source: Source) -> Iterable[tuple[str, str, bool]]:
    """What the file says of itself as a whole: a name, a text, and whether the text is code."""
    yield "kind", source.kind, False
    yield "file", str(source.path), True
    record = source.record
    for name in dict.fromkeys([*_FIRST_FACTS, *record]):
        value = record.get(name)
        if name == "command" and value:
            yield name, value, True
        elif name not in _NO_FACTS:
            parts = flat(value) if isinstance(value, dict) else flat({"": value})
            text = ", ".join(f"{key} {_text(part)}".strip() for key, part in parts)
            if text:
                yield name.replace("_", " "), text, False


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
