"""Mixtures of texts: names, files and weights of a flag, and the part of every text."""

from pathlib import Path

import pytest

from slim_utils.common.errors import UserError
from slim_utils.text_mixture import TextSource, parse_text_source, parse_text_sources, shares


def test_parse_text_source_reads_names_files_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:2", "b.txt"):
        Path(name).write_text("x")
    assert parse_text_source("--text", "c4:0.7") == TextSource("c4", 0.7)
    assert parse_text_source("--text", "org/data") == TextSource("org/data", 1.0)
    assert parse_text_source("--text", "b.txt:3") == TextSource("b.txt", 3.0)
    # An existing file takes precedence.
    assert parse_text_source("--text", "a:2") == TextSource("a:2", 1.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("c4:x", "--text c4:x: the weight x is not a number"),
        ("c4:0", "--text c4:0: the weight must be positive"),
        ("c4:nan", "--text c4:nan: the weight must be positive"),
        ("none.txt", "--text none.txt: no such file"),
        ("", "--text '': no text; give NAME"),
        (":2", "--text ':2': no text; give NAME"),
        ("none.jsonl.gz:2", r"--text none.jsonl.gz: no such file"),
    ],
)
def test_parse_text_source_of_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        parse_text_source("--text", spec)


def test_parse_text_sources_of_a_text_given_twice_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("x")
    assert parse_text_sources("--text", ["c4", "b.txt:3"]) == [TextSource("c4"), TextSource("b.txt", 3.0)]
    for specs in (["c4", "b.txt:2", f"{tmp_path}/b.txt"], ["c4:1", "b.txt", "c4:2"]):
        name = specs[-1].partition(":")[0]
        with pytest.raises(UserError, match=f"--text {name}: given twice; give it once, with a weight: {name}:2"):
            parse_text_sources("--text", specs)


@pytest.mark.parametrize(
    ("weights", "total", "parts"),
    [
        ([1, 1], 5, [3, 2]),
        ([1, 1, 1], 32, [11, 11, 10]),
        ([0.1, 0.1, 0.1], 32, [11, 11, 10]),
        ([0.7, 0.3], 32, [22, 10]),
        ([0.7, 0.3], 10, [7, 3]),
        ([100, 1], 10, [10, 0]),
        ([3], 7, [7]),
    ],
)
def test_shares_are_in_proportion_and_sum_to_the_total(weights, total, parts):
    assert shares(weights, total) == parts
