"""Rows and table of the recovery benchmark."""

import math
from pathlib import Path

import pytest

from benchmarks.bench_recovery import ALPACA, NONE, TWO_ROUNDS, Key, build_parser, row_keys, table, train_in_rounds

REQUIRED = ["model", "--calib_file", "c", "--train_text", "t", "--alpaca_file", "a", "--eval_files", "e=e"]
REQUIRED += ["--work_dir", "w", "--out", "o"]


def test_train_in_rounds_prunes_what_is_left_and_goes_on_in_the_text(tmp_path, monkeypatch):
    commands = []

    def run(script, *argv):
        commands.append([script, *map(str, argv)])
        folder = Path(commands[-1][commands[-1].index("--save_dir" if "slimming" in script else "--output_dir") + 1])
        folder.mkdir()
        (folder / "run.json").write_text("{}")

    monkeypatch.setattr("benchmarks.bench_recovery.run", run)
    flags = ["--calib_file", "a", "--train_text", "b", "--eval_files", "c=c", "--work_dir", tmp_path, "--out", "out"]
    args = build_parser().parse_args(["dense", *map(str, flags)])
    (recovery,) = TWO_ROUNDS
    folders = train_in_rounds(args, ["c=c"], Key("best", 0.5, recovery, 1000, None))
    prunings, trainings = commands[::2], commands[1::2]
    shares = [float(command[command.index("--target_ratio") + 1]) for command in prunings]
    assert shares == pytest.approx([1 - 0.5**0.5] * 2)
    assert [command[1] for command in prunings] == ["dense", str(folders[0])]
    assert [command[command.index("--skip_train_tokens") + 1] for command in trainings] == ["0", "500"]
    assert all(command[command.index("--max_train_tokens") + 1] == "500" for command in trainings)
    assert [command[command.index("--output_dir") + 1] for command in trainings] == list(map(str, folders))
    # Also on a GPU, which trains on text in bf16 by default.
    assert all(command[command.index("--bf16") + 1] == "false" for command in trainings)


def test_row_keys_begin_with_the_models_without_recovery():
    keys = row_keys(build_parser().parse_args([*REQUIRED, "--shares", "0.2", "0.5", "--tokens", "9", "99"]))
    models = [("paper", 0.2), ("paper", 0.5), ("best", 0.2), ("best", 0.5), ("dense", 0.0)]
    assert keys[:5] == [(*model, NONE, 0, None) for model in models]
    assert [key[3] for key in keys[5:]] == sorted(key[3] for key in keys[5:])
    assert len(set(keys)) == len(keys) == 5 + 2 * (4 * 6 + 2)
    # A dense model is not distilled from itself.
    assert {key[2] for key in keys if key[0] == "dense"} == {NONE, ALPACA, "cross-entropy, block weights"}


def test_table_has_the_loss_as_a_share_of_the_originals():
    def row(method, share, recovery, tokens, perplexity):
        return {
            "method": method,
            "share": share,
            "recovery": recovery,
            "tokens": tokens,
            "perplexity": {"a": perplexity},
        }

    rows = [row("dense", 0.0, NONE, 0, 10.0), row("paper", 0.2, NONE, 0, 10 * math.exp(0.4))]
    rows.append(row("best", 0.2, "KL, LoRA", 1000, 10 * math.exp(0.1)) | {"training_seconds": 12.3})
    assert "| best | KL, LoRA | 1,000 | 11.05 | 12 |" in table(rows[2:])
    lines = table(rows).splitlines()
    assert lines[0] == "| removed | pruned by | recovery | tokens | a | seconds |"
    assert lines[2:] == [
        "| 0 % | dense | none |  | 10.00 |  |",
        "| 20 % | best | KL, LoRA | 1,000 | 11.05 (0.100, 0.25) | 12 |",
        "| 20 % | paper | none |  | 14.92 (0.400, 1.00) |  |",
    ]
    rows[2] |= {"learning_rate": 5e-4, "held_out": [[0, 3.4567], [5, 3.25], [9, 3.6]]}
    lines = table(rows).splitlines()
    assert lines[0] == "| removed | pruned by | recovery | tokens | a | held-out | seconds |"
    assert lines[3] == "| 20 % | best | KL, LoRA, 0.0005 | 1,000 | 11.05 (0.100, 0.25) | 3.457 → 3.250 | 12 |"


def test_row_keys_have_every_learning_rate():
    keys = row_keys(build_parser().parse_args([*REQUIRED, "--tokens", "9", "--learning_rates", "1e-4", "2e-4"]))
    assert {key.learning_rate for key in keys if key.tokens} == {1e-4, 2e-4}
    assert {key.learning_rate for key in keys if not key.tokens} == {None}
