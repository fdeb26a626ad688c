"""Shared functions of the benchmarks: resumable rows, and rows measured in new processes."""

import json

import pytest
import torch

from benchmarks.measuring import eval_sets, measure_in_new_process, measure_missing_rows, named_files
from slim_utils.common.errors import UserError


def test_named_files_of_an_invalid_spec_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert named_files("--f", [f"a={tmp_path}/a.txt"]) == {"a": tmp_path / "a.txt"}
    for spec in (f"{tmp_path}/a.txt", f"a={tmp_path}/b.txt"):
        with pytest.raises(UserError, match=f"--f {spec}: give NAME=FILE"):
            named_files("--f", [spec])


def test_eval_sets_are_the_first_windows_of_every_text(tokenizer, text_file):
    plain = eval_sets(tokenizer, [f"mine={text_file}"], 3, 8)["mine"]
    assert plain.shape == (3, 8)
    with_bos = eval_sets(tokenizer, [f"mine={text_file}"], 3, 9, bos=1)["mine"]
    assert torch.equal(with_bos[:, 1:], plain) and set(with_bos[:, 0].tolist()) == {1}


def test_measure_missing_rows_after_a_failure_measures_only_missing_rows(tmp_path):
    out, protocol, measured = tmp_path / "out.json", {"seed": 0}, []

    def measure(name: str, share: float) -> dict:
        measured.append((name, share))
        if name == "broken":
            raise UserError("broken")
        return {"name": name, "share": share, "perplexity": 2.0}

    keys = [("a", 0.0), ("broken", 0.5), ("b", 0.5)]
    with pytest.raises(UserError, match="broken"):
        measure_missing_rows(out, protocol, ("name", "share"), keys, measure)
    keys.remove(("broken", 0.5))
    record = measure_missing_rows(out, protocol, ("name", "share"), keys, measure)
    assert measured == [("a", 0.0), ("broken", 0.5), ("b", 0.5)]
    assert [row["name"] for row in record["rows"]] == ["a", "b"]
    assert json.loads(out.read_text()) == record
    with pytest.raises(UserError, match="has another protocol"):
        measure_missing_rows(out, {"seed": 1}, ("name", "share"), keys, measure)


def test_measure_missing_rows_on_a_gpu_records_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for device in ("cpu", "cuda"):
        keys, measure = [("a",)], lambda name: {"name": name}
        record = measure_missing_rows(tmp_path / device, {}, ("name",), keys, measure, torch.device(device))
        assert record["hardware"]["device"] == {"cpu": "cpu", "cuda": "a GPU"}[device]


def test_measure_in_new_process_reads_the_row_that_the_script_wrote(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\nname, flag, out = sys.argv[1:]\njson.dump({'name': name}, open(out, 'w'))\n"
        "exit(name == 'bad')"
    )
    assert measure_in_new_process(str(script), ["good"], "good") == {"name": "good"}
    with pytest.raises(UserError, match="a bad one could not be measured"):
        measure_in_new_process(str(script), ["bad"], "a bad one")
