"""Mixtures of texts: the texts and weights of a flag, and what each contributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slim_utils.common.errors import UserError
from slim_utils.text_source import names_file


@dataclass(frozen=True)
class TextSource:
    """A text and its weight in the mixture.

    Attributes:
        name: local file, key of ``HUB_SOURCES``, or hub name of a data set with a column of text.
        weight: relative number of windows.
    """

    name: str
    weight: float = 1.0


def parse_text_source(flag: str, spec: str) -> TextSource:
    """Return the text and weight of ``spec``: ``NAME``, ``FILE``, ``NAME:WEIGHT`` or ``FILE:WEIGHT``.

    Args:
        flag: flag of the texts, for messages.
        spec: one of its values.

    Raises:
        UserError: if there is no name, the weight is not a positive number, or a local file does not exist.
    """
    name, colon, weight = spec.rpartition(":")
    source = TextSource(spec)
    if colon and not Path(spec).is_file():
        try:
            source = TextSource(name, float(weight))
        except ValueError:
            raise UserError(
                f"{flag} {spec}: the weight {weight} is not a number; give NAME:WEIGHT or FILE:WEIGHT"
            ) from None
    if not source.name.strip():
        raise UserError(f"{flag} {spec!r}: no text; give NAME, FILE, NAME:WEIGHT or FILE:WEIGHT")
    if not (source.weight > 0 and math.isfinite(source.weight)):
        raise UserError(f"{flag} {spec}: the weight must be positive")
    if names_file(source.name) and not Path(source.name).expanduser().is_file():
        raise UserError(f"{flag} {source.name}: no such file")
    return source


def parse_text_sources(flag: str, specs: Iterable[str]) -> list[TextSource]:
    """Return the texts and weights of ``specs``; arguments as of :func:`parse_text_source`.

    Raises:
        UserError: also if a text is given twice.
    """
    sources: dict[str, TextSource] = {}
    for spec in specs:
        source = parse_text_source(flag, spec)
        path = Path(source.name).expanduser()
        key = str(path.resolve()) if path.is_file() else source.name
        if key in sources:
            raise UserError(f"{flag} {source.name}: given twice; give it once, with a weight: {source.name}:2")
        sources[key] = source
    return list(sources.values())


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Return the parts of ``total`` in proportion to ``weights``; what rounding leaves goes to the largest fractions.

    Of equal fractions, the first ones get it.
    """
    # Rounded, so that equal weights have equal fractions.
    exact = [round(total * weight / sum(weights), 9) for weight in weights]
    parts = [math.floor(part) for part in exact]
    by_fraction = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])
    for index in by_fraction[: total - sum(parts)]:
        parts[index] += 1
    return parts
