"""The page of a report: one HTML file that asks for nothing else."""

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from slim_utils.report.plots import SECTIONS, Plot, Rows
from slim_utils.report.sources import Source, flat

# What a browser may fetch: nothing but the pictures in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; --ink: #1f2328; --quiet: #59636e; --line: #d9dee3; --tint: #f5f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink); line-height: 1.5;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; letter-spacing: -.01em; }
h2 { margin: 2.75rem 0 .9rem; font-size: 1.3rem; }
h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: .25rem 0; color: var(--quiet); }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; margin-top: 1rem; }
figure, article { margin: 0 0 1.25rem; padding: 1rem 1.25rem; background: #fff; border: 1px solid var(--line);
  border-radius: .6rem; }
figcaption { margin-top: .5rem; color: var(--quiet); font-size: .9rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
figure .scroll { margin-top: .75rem; }
img { display: block; max-width: 100%; min-width: 34rem; height: auto; margin: 0 auto; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; margin: .75rem 0;
  font-size: .9rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .85em/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
table { margin-top: .75rem; border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; }
td { max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
td.number { text-align: right; }
footer { padding-top: 1rem; padding-bottom: 2.5rem; font-size: .85rem; }
@media (max-width: 40rem) {
  header, main, footer { padding-left: .75rem; padding-right: .75rem; }
  figure, article { padding: .75rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .4rem; }
}
"""
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


def page(pictures: list[Picture], sources: list[tuple[Source, Rows]], made_by: str) -> str:
    """The whole page.

    Args:
        pictures: by section.
        sources: with their numbers.
        made_by: the command and the versions that made it.
    """
    sections = [key for key in SECTIONS if any(picture.plot.section == key for picture in pictures)]
    links = [f'<a href="#{key}">{SECTIONS[key]}</a>' for key in sections]
    body = []
    for key in sections:
        figures = "".join(_figure(picture) for picture in pictures if picture.plot.section == key)
        body.append(f'<section id="{key}">\n<h2>{SECTIONS[key]}</h2>\n{figures}</section>\n')
    numbers = "".join(_article(source, rows) for source, rows in sources)
    names = html.escape(", ".join(source.label for source, _ in sources))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SlimGPT report: {names}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>SlimGPT report</h1>
<p>{names}</p>
<nav>{"".join(links)}<a href="#numbers">Numbers, commands, hardware</a></nav>
</header>
<main>
{"".join(body)}<section id="numbers">
<h2>Numbers, commands, hardware</h2>
{numbers}</section>
</main>
<footer><p>{html.escape(made_by)}</p></footer>
</body>
</html>
"""


def _figure(picture: Picture) -> str:
    plot, data = picture.plot, base64.b64encode(picture.png).decode("ascii")
    alt = html.escape(f"{SECTIONS[plot.section]}, {plot.title}: {plot.caption}", quote=True)
    size = f'width="{picture.width}" height="{picture.height}"'
    return f"""<figure>
<h3>{html.escape(plot.title)}</h3>
<div class="scroll" tabindex="0"><img src="data:image/png;base64,{data}" {size} alt="{alt}"></div>
<figcaption>{html.escape(plot.caption)}</figcaption>
</figure>
"""


def _article(source: Source, rows: Rows) -> str:
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{value}</dd>\n" for name, value in _facts(source))
    table = f"<details>\n<summary>{len(rows)} rows</summary>\n{_table(rows)}</details>\n" if rows else ""
    return f"<article>\n<h3>{html.escape(source.label)}</h3>\n<dl>\n{facts}</dl>\n{table}</article>\n"


def _facts(source: Source) -> Iterable[tuple[str, str]]:
    """Names, and values as HTML: what the file says of itself as a whole."""
    yield "kind", html.escape(source.kind)
    yield "file", f"<code>{html.escape(str(source.path))}</code>"
    record = source.record
    for name in dict.fromkeys([*_FIRST_FACTS, *record]):
        value = record.get(name)
        if name == "command" and value:
            yield name, f"<code>{html.escape(value)}</code>"
        elif name not in _NO_FACTS:
            parts = flat(value) if isinstance(value, dict) else flat({"": value})
            text = ", ".join(f"{key} {_text(part)}".strip() for key, part in parts)
            if text:
                yield name.replace("_", " "), html.escape(text)


def _table(rows: Rows) -> str:
    """A column for every name that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    lines = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in names)}</tr>\n" for row in rows)
    return f"""<div class="scroll" tabindex="0"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{lines}</tbody>
</table></div>
"""


def _cell(value: Any) -> str:
    text = html.escape(_text(value), quote=True)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number">{text}</td>'
    return f'<td title="{text}">{text}</td>' if len(text) > 32 else f"<td>{text}</td>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
