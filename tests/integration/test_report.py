"""A report of pruning runs and benchmark results, as a user makes it, and in a browser."""

import base64
import io
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import model_slimming
from tests.browser import Page, browser
from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
WIDTH = 1200


def report(*arguments: object) -> subprocess.CompletedProcess:
    """Run the script in a new process."""
    return run_python("-m", "scripts.report", *arguments)


def shades(png: bytes | np.ndarray) -> int:
    """Number of different colours in a picture."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) if isinstance(png, bytes) else png
    # One number per pixel sorts much faster than three.
    return len(np.unique(pixels[..., :3].astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)))


class Reader(HTMLParser):
    """Parser that collects the tags and images of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint, text_file) -> Path:
    """The report of two tiny runs, one of them evaluated, and of every result in the repository."""
    base = tmp_path_factory.mktemp("report")
    common = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--device", "cpu"]
    runs = {
        "evaluated": ["--sparsity", 0.4, "--eval_datasets", f"text={text_file}", "--eval_seqlens", 16, 64],
        "skipped": ["--non_uniform", "--max_sparsity", 0.5, "--skip_evaluate"],
    }
    for name, flags in runs.items():
        arguments = [*common, *flags, "--save_dir", base / name]
        model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))
    process = report(base / "evaluated", base / "skipped" / "run.json", *RESULTS, "--out", base / "out")
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert {path.name for path in base.iterdir()} == {*runs, "out"}
    return base / "out"


@pytest.fixture(scope="module")
def page(folder) -> Reader:
    return Reader((folder / "index.html").read_text(encoding="utf-8"))


def test_report_page_embeds_the_figures_of_the_folder(folder, page):
    files = sorted(folder.glob("*.png"))
    assert {path.name for path in folder.iterdir()} == {"index.html", "run.json", *(path.name for path in files)}
    assert {path.name.partition("_")[0] for path in files} == {"kept", "error", "perplexity", "cost"}
    embedded = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(embedded) == sorted(path.read_bytes() for path in files)
    assert all(shades(png) > 20 for png in embedded)
    assert all(len(image["alt"]) > 40 for image in page.images)


def test_report_page_is_self_contained(folder, page):
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert not set(page.tags) & {"script", "iframe", "object", "embed", "audio", "video"}
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text) + re.findall(r"url\(|@import", text)


def test_report_page_has_commands_versions_hardware_and_numbers(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    for path in (folder.parent / "evaluated" / "run.json", *RESULTS):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert f"transformers {record['versions']['transformers']}" in text
        assert record["hardware"]["machine"] in text
    serving = json.loads((ROOT / "benchmarks" / "results" / "serving_speed.json").read_text(encoding="utf-8"))
    assert serving["command"] in text
    assert all(f">{row['tokens_per_second']:.6g}</td>" in text for row in serving["rows"])


def test_report_with_wrong_input_exits_with_one_line(tmp_path):
    (tmp_path / "strange.json").write_text('{"a": 1}', encoding="utf-8")
    process = report(tmp_path / "strange.json", "--out", tmp_path / "out")
    assert process.returncode == 2
    assert re.fullmatch(r"report\.py: error: RUN \S+strange\.json: unknown kind of file; .+\n", process.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["strange.json"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A page in Chromium."""
    with browser(tmp_path_factory.mktemp("browser") / "profile", WIDTH, 900) as chromium:
        yield chromium


BOXES = """
[...document.images].map(image => {
  const box = image.getBoundingClientRect();
  return [image.complete && image.naturalWidth, box.left, box.top + scrollY, box.width, box.height].map(Math.round);
})
"""


def test_report_page_in_a_browser_shows_every_figure_without_errors(opened: Page, folder, page):
    url = (folder / "index.html").as_uri()
    opened.open(url)
    boxes = opened.evaluate(BOXES)
    assert len(boxes) == len(page.images) == len(list(folder.glob("*.png")))
    screenshot = np.asarray(Image.open(io.BytesIO(opened.screenshot())).convert("RGB"))
    assert screenshot.shape[1] == WIDTH
    for natural_width, left, top, width, height in boxes:
        assert natural_width > 0
        shown = screenshot[top : top + height, left : left + width]
        assert shown.shape[:2] == (height, width)
        assert shades(shown) > 20
        assert shown.std() > 5
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.requests() == [url]
    assert opened.errors() == []


def test_browser_with_a_broken_page_reports_requests_and_errors(opened: Page, tmp_path):
    """Shows that the test above would notice requests and errors."""
    (tmp_path / "bad.html").write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"img-src 'none'\">"
        "<link rel=icon href='data:,'><link rel=stylesheet href='none.css'><img src='data:image/png;base64,AA'>",
        encoding="utf-8",
    )
    opened.open((tmp_path / "bad.html").as_uri())
    assert opened.evaluate("document.images[0].naturalWidth") == 0
    assert len(opened.requests()) == 2
    assert len(opened.errors()) >= 2
