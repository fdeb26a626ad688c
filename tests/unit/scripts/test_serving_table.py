"""``scripts/serving_table.py``, the rows that tests add, and the page."""

import json
import multiprocessing
from pathlib import Path

import pytest

from models.families import ROWS
from scripts import serving_table
from slim_utils.common.errors import UserError
from slim_utils.output.model_card import vllm_options
from tests.interop.served import record_served
from tests.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parents[3]
ROWS_OF_FILE = json.loads((ROOT / "serving/tested.json").read_text(encoding="utf-8"))["rows"]


def test_record_served_adds_every_row_once(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    record_served("b", "llama", "dense", "fp32")
    monkeypatch.setenv("SLIMGPT_SERVING_TABLE", str(path))
    for engine in ("b", "a", "b"):
        record_served(engine, "llama", "dense", "fp32")
    table = json.loads(path.read_text())
    assert [row["engine"] for row in table["rows"]] == ["a", "b"]
    assert table["engines"]["requirements-vllm.txt"] and table["environment"]["commit"]


def test_record_served_of_several_processes_keeps_all_rows(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    monkeypatch.setenv("SLIMGPT_SERVING_TABLE", str(path))
    # Forked, so that all of them write at once.
    forked = multiprocessing.get_context("fork")
    workers = [forked.Process(target=record_served, args=("a", f"f{i}", "dense", "fp32")) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [row["family"] for row in json.loads(path.read_text())["rows"]] == [f"f{i}" for i in range(8)]


def test_table_has_a_line_per_engine_and_family_and_a_column_per_shape():
    rows = [("e", "llama", "other", "q4_0"), ("e", "llama", "dense", "fp32"), ("e", "llama", "dense", "bf16")]
    rows.append(("e", "gemma2", "stock", "fp32"))
    keys = ("engine", "family", "shape", "dtype")
    lines = serving_table.table([dict(zip(keys, row, strict=True)) for row in rows]).splitlines()
    assert lines[0] == "| engine | family | dense | stock | other |"
    assert lines[2:] == ["| e | gemma2 |  | fp32 |  |", "| e | llama | bf16, fp32 |  | q4_0 |"]


def test_page_without_markers_is_refused():
    with pytest.raises(UserError, match="no lines <!-- serving table -->"):
        serving_table.with_table("# Serving\n", [])


def test_page_has_the_table_of_the_results():
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert serving_table.with_table(page, ROWS_OF_FILE) == page


@pytest.mark.parametrize("name", [row.base_type for row in ROWS])
def test_card_has_a_vllm_command_for_stock_shapes_where_the_table_has_them(name):
    served = any((row["engine"], row["family"]) == ("vLLM", name) for row in ROWS_OF_FILE)
    assert (vllm_options(make_tiny(name).config) is not None) == served
