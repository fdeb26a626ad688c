"""``--target_latency`` and ``test_flops.py --latency_table`` as a user runs them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import model_slimming
import test_flops
from slim_utils.cli import slimming_latency
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.errors import UserError
from slim_utils.layerwise.resume import LayerStore
from slim_utils.masks import read_pruning
from slim_utils.profiling.latency_table import read_latency_table
from tests.latency_tables import made_up_table
from tests.processes import run_python
from tests.tiny_models import make_tiny


def run(*arguments: object) -> None:
    """Run ``model_slimming.py`` in this process."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))


@pytest.fixture
def words(checkpoint, text_file) -> list:
    """Arguments of a short run without a target."""
    flags = ["--num_samples", 16, "--seqlen", 32, "--device", "cpu", "--skip_evaluate"]
    return [checkpoint, "--data_file", text_file, *flags]


@pytest.fixture
def table_file(checkpoint, tmp_path) -> Path:
    """Made-up table of ``checkpoint``: 3 ms a query head of each group, 0.5 ms a column and 2 ms besides."""
    path = tmp_path / "table.json"
    table = made_up_table(AutoConfig.from_pretrained(checkpoint), lambda n: 3.0 * n, lambda n: 2 + 0.5 * n)
    write_json_atomic(path, table.to_json())
    return path


@pytest.mark.parametrize("allocation", ["log_increase", "search"])
def test_target_latency_by_a_file_is_predicted_and_measured(words, table_file, tmp_path, allocation, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    flags = ["--target_latency", "0.8x", "--latency_of", "prefill", "--latency_file", table_file]
    run(*words, *flags, "--allocation", allocation, "--save_pruned_weights", "--save_dir", out)
    predicted = 1 + sum(
        3 * len(mask.kept_heads) / 2 + 2 + 0.5 * mask.kept_width for mask in read_pruning(out / "pruning.json")
    )
    dense = 1 + 4 * (9 + 2 + 20)
    assert 0.8 * dense - 0.5 <= predicted <= 0.8 * dense + 1e-9
    record = json.loads((out / "run.json").read_text())["latency"]
    milliseconds = [1e3 * record[name] for name in ("dense", "requested", "predicted")]
    assert milliseconds == pytest.approx([dense, 0.8 * dense, predicted])
    assert record["of"] == "prefill" and record["table"]["device"] == "an abacus"
    assert len(record["measured"]["runs"]["pruned"]["decode"]) == 5
    assert record["measured"]["seconds"]["pruned"] > 0
    target = next(message for message in caplog.messages if message.startswith("target: "))
    assert f"requested {0.8 * dense:.4g} ms, predicted {predicted:.4g} ms on an abacus" in target
    assert any("measured on an abacus, this is" in message for message in caplog.messages)
    assert any(message.startswith("measured prefill of 2 × 8 tokens") for message in caplog.messages)
    assert "down to 0.8x of prefill on an abacus" in (out / "pruned_weights" / "README.md").read_text()


def test_target_latency_without_a_file_measures_first_and_resumes_with_that_table(words, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    out, measured = tmp_path / "out", []
    flags = ["--target_latency", "0.9x", "--at_context", 8, "--at_batch", 2, "--save_dir", out]

    def measure(config, dtype, device, request, gqa_unit):
        # Of the tiny model most of the time is overhead; every measurement differs.
        table = made_up_table(config, lambda n: 3.0 * n, lambda n: (1 + len(measured)) * n**0.5, gqa_unit=gqa_unit)
        measured.append(replace(table, request=request, device=str(device), dtype=str(dtype)))
        return measured[-1]

    monkeypatch.setattr(slimming_latency, "measure_latency_table", measure)
    save, layers = LayerStore.save, []

    def interrupted(self, layer, family, report):
        layers.append(report.layer)
        if len(layers) == 3:
            raise KeyboardInterrupt
        save(self, layer, family, report)

    with monkeypatch.context() as patched:
        patched.setattr(LayerStore, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*words, *flags)
    assert "measuring a latency table, 2 × 8 tokens + 32 steps" in caplog.text
    run(*words, *flags, "--resume")
    assert len(measured) == 1
    record = json.loads((out / "run.json").read_text())["latency"]
    assert record["table"] == json.loads(json.dumps(measured[0].to_json()))
    assert record["of"] == "generation" and "measured" not in record
    assert record["predicted"] <= record["requested"] == pytest.approx(0.9 * record["dense"])


def test_latency_table_measured_in_a_process_of_its_own_is_used(words, tokenizer, tmp_path):
    checkpoint, table, out = tmp_path / "wide", tmp_path / "table.json", tmp_path / "out"
    # Wide enough for columns to take more time than the calls.
    make_tiny("gqa", hidden_size=48, intermediate_size=1024).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    flags = ["--lengths", 32, "--new_tokens", 3, "--repeats", 2, "--device", "cpu", "--gqa_unit", "kv_group"]
    process = run_python("test_flops.py", "--base_model", checkpoint, "--latency_table", table, *flags)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].split() == ["kept", "prefill", "(ms)", "decode", "(ms/step)"]
    assert len(lines) == 1 + 2 + 8 + 1
    content = read_latency_table(table)
    assert content.request.batch_size == 1 and content.gqa_unit == "kv_group"
    assert content.command.startswith("test_flops.py") and content.versions["torch"] == torch.__version__
    target = ["--target_latency", "0.95x", "--latency_of", "prefill", "--latency_file", table, "--gqa_unit", "kv_group"]
    process = run_python("model_slimming.py", checkpoint, *words[1:], *target, "--save_dir", out)
    assert process.returncode == 0, process.stderr
    assert "target: prefill of 1 × 32 tokens + 3 steps: requested" in process.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_latency", "fast"], "--target_latency fast: give a size such as 12ms, or a share"),
        (["--target_latency", "1.5x"], "above 0 and below 1"),
        (["--target_latency", "1s"], "--target_latency 1s: the model has 506 ms of generation"),
        (["--target_latency", "0.01x"], "can be removed; .*or --target_latency"),
        (["--target_latency", "0.8x", "--target_macs", "0.8x"], "exclude each other"),
        (["--latency_of", "decode"], "--latency_of is a part of --target_latency"),
        ([], "--latency_file is a part of --target_latency"),
        (["--target_latency", "0.8x", "--gqa_unit", "kv_group"], "measured by query_head; add --gqa_unit query_head"),
        (["--target_latency", "0.8x", "--dtype", "bfloat16"], "measured in float32, the run has bfloat16; add --dtype"),
        (["--target_latency", "0.8x", "--at_batch", "4"], "--at_batch 4: .* was measured with 2; leave it out"),
        (["--target_latency", "0.8x", "--at_context", "9"], "--at_context 9: .* was measured with 8; leave it out"),
    ],
)
def test_target_latency_with_wrong_flags_is_refused(words, table_file, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(*words, *flags, "--latency_file", table_file, "--save_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_table_of_another_model_is_refused(words, checkpoint, table_file, tmp_path):
    content = json.loads(table_file.read_text())
    content["model"]["hidden_size"] = 48
    write_json_atomic(table_file, content)
    flags = ["--target_latency", "0.8x", "--latency_file", table_file]
    with pytest.raises(UserError, match=r"of another model .*hidden size 48.*; measure one with"):
        run(*words, *flags)
    content["model"]["hidden_size"] = 24
    content["model"]["shapes"][2]["num_columns"] = 32
    write_json_atomic(table_file, content)
    with pytest.raises(UserError, match="other layer shapes"):
        run(*words, *flags)


@pytest.mark.parametrize(
    ("file", "message"), [("none.json", "--latency_file .*none.json: no such file"), ("text", "not a latency table")]
)
def test_latency_file_that_is_none_is_refused(words, text_file, tmp_path, file, message):
    path = text_file if file == "text" else tmp_path / file
    with pytest.raises(UserError, match=message):
        run(*words, "--target_latency", "0.8x", "--latency_file", path)


def test_target_latency_in_several_processes_needs_a_file(words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"measures in one process; .* --latency_file"):
        run(*words, "--target_latency", "0.8x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "{model}"], "--latency_table is a run of its own; leave --compare out"),
        (["--out", "{tmp}/out.json"], "leave --out out"),
        (["--batch_sizes", "1", "2"], "--batch_sizes: a latency table has one"),
        (["--lengths", "1", "2"], "--lengths: a latency table has one"),
        (["--lengths", "60"], "64 positions"),
        (["--latency_table", "{tmp}/none/table.json"], "no such folder"),
    ],
)
def test_latency_table_with_wrong_flags_is_refused(checkpoint, tmp_path, flags, message):
    words = ["--base_model", "{model}", "--latency_table", "{tmp}/table.json", "--device", "cpu", *flags]
    words = [word.format(model=checkpoint, tmp=tmp_path) for word in words]
    with pytest.raises(UserError, match=message):
        test_flops.main(test_flops.build_parser().parse_args(words))
    assert not (tmp_path / "table.json").exists()


def test_gqa_unit_without_a_table_is_refused(checkpoint):
    words = ["--base_model", str(checkpoint), "--gqa_unit", "kv_group"]
    with pytest.raises(UserError, match="--gqa_unit is a part of --latency_table"):
        test_flops.main(test_flops.build_parser().parse_args(words))
