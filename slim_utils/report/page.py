"""The page of a report: a self-contained HTML file, rendered from the template beside this module."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slim_utils.report.plot import SECTIONS, Plot
from slim_utils.report.sources import COMPARED, Rows, Source, flatten

TEMPLATE = "report.html.j2"
# Top-level keys that are listed first, and keys that are skipped because the command or the rows contain them.
_FIRST_FACTS = ("command", "seed", "versions", "hardware")
_SKIPPED_FACTS = ("arguments", "prompt", *COMPARED, "models", "runs")


@dataclass(frozen=True)
class Picture:
    """A drawn figure: the bytes of its PNG, and its width and height in CSS pixels."""

    plot: Plot
    png: bytes
    width: int
    height: int

    @property
    def base64(self) -> str:
        """The PNG, base64-encoded."""
        return base64.b64encode(self.png).decode("ascii")


def page(pictures: list[Picture], sources: list[tuple[Source, Rows]], made_by: str) -> str:
    """The HTML of the report.

    Args:
        pictures: figures, ordered by section.
        sources: sources with their flat rows.
        made_by: footer with the command and the versions.
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
    """Template variables of a source; the table has a column for every name in any row."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {"label": source.label, "facts": list(_facts(source)), "columns": columns, "rows": rows}


def _facts(source: Source) -> Iterable[tuple[str, str, bool]]:
    """Facts about a source: name, text, and whether the text is code."""
    yield "kind", source.kind, False
    yield "file", str(source.path), True
    record = source.record
    for name in dict.fromkeys([*_FIRST_FACTS, *record]):
        value = record.get(name)
        if name == "command" and value:
            yield name, value, True
        elif name not in _SKIPPED_FACTS:
            parts = flatten(value) if isinstance(value, dict) else flatten({"": value})
            text = ", ".join(f"{key} {_text(part)}".strip() for key, part in parts)
            if text:
                yield name.replace("_", " "), text, False


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
