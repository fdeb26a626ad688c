"""Tables of the quality benchmark."""

import math

from benchmarks.quality_table import loss_table, table


def row(method: str, share: float, seed: int, loss: float) -> dict:
    """A row whose ln perplexity is ``loss`` above that of a dense perplexity of 10."""
    figures = {"perplexity": {"text": 10 * math.exp(loss)}, "peak_memory_mib": {"host": 100}}
    pruning = {"share_removed": share, "seconds": 50 + seed} if share else {}
    return {"heads": "repeated", "method": method, "share": share, "seed": seed} | figures | pruning


RECORD = {
    "rows": [
        row("best", 0.2, 1, 0.3),
        row("dense", 0.0, 0, 0.0),
        row("slimgpt_log_increase", 0.2, 0, 0.5),
        row("slimgpt_log_increase", 0.2, 1, 0.4),
        row("best", 0.2, 0, 0.25),
        row("best", 0.2, 2, 9.0),
        row("flap", 0.33, 0, 1.0),
    ]
}


def test_table_of_several_seeds_has_mean_and_deviation():
    lines = table(RECORD).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == [
        "dense",
        "SlimGPT, log_increase",
        "SlimGPT, --preset best",
        "FLAP",
    ]
    assert lines[3] == "| repeated | 20.0 % | SlimGPT, log_increase | 15.70 ± 1.11 | 50 ± 1 | 100 ± 0 |"
    assert lines[2] == "| repeated | 0.0 % | dense | 10.00 |  | 100 |"


def test_loss_table_is_relative_to_the_original_with_the_same_seed():
    """Shares and seeds without a measurement of the original are skipped."""
    assert loss_table(RECORD).splitlines()[2:] == ["| repeated | 20 % | SlimGPT, --preset best | 0.62 ± 0.18 |"]
