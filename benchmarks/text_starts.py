"""First tokens that are no longer attention sinks after pruning, with and without sink windows.

    python -m benchmarks.text_starts SmolLM2-135M-Instruct --calib_file wikitext2/valid.tokens.txt \
        --eval_file wikitext2/test.tokens.txt --out benchmarks/results/text_starts.json

Protocol: fp32, multi-head attention, 32 × 512 tokens of the calibration text, log_increase from 0.0625, exact head
scores, groups of 32 columns, damping 0.01. A first token counts as lost if the largest norm of its hidden state over
the layers is less than half of that in the dense model, in 2048 random windows (--seed) of 4 tokens of the evaluation
text. Perplexity: the first 8 × 1024 tokens of that text.
"""

import argparse
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_quality import EVAL_SEQLEN, EVAL_WINDOWS, FINE, LOG_INCREASE, prune_with
from benchmarks.measuring import file_tokens
from benchmarks.smollm2_perplexity import NUM_SAMPLES, PERCDAMP, SEQLEN, repeat_kv_heads
from ppl_eval.ppl_dataset import eval_windows
from ppl_eval.ppl_eval import perplexity
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.loading import load_model, load_tokenizer
from slim_utils.layerwise.offload import CPU
from slim_utils.profiling.tables import markdown_table
from slim_utils.pruning_config import BEST_SINK_WINDOWS
from slim_utils.slim_dataset import load_calibration, random_windows
from slim_utils.text_mixture import TextSource

logger = logging.getLogger("text_starts")

NUM_WINDOWS, WINDOW_TOKENS = 2048, 4
LOST = 0.5
BATCH = 128


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="text_starts.py", description="Attention sinks lost by pruning.")
    parser.add_argument("model", help="SmolLM2-135M as a checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_file", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.33, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


@torch.no_grad()
def largest_norms(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Largest norms (windows,), over the layers, of the hidden states of first tokens."""
    norms = []
    for batch in windows.split(BATCH):
        hidden = model.base_model(batch, output_hidden_states=True).hidden_states[:-1]
        norms.append(torch.stack([layer[:, 0].norm(dim=-1) for layer in hidden]).amax(0))
    return torch.cat(norms)


def main(args: argparse.Namespace) -> None:
    """Prune at every share, with and without sink windows, and count lost first tokens."""
    check_output_file(args.out, False, "--out")
    tokenizer = load_tokenizer(args.model, False)
    data = load_calibration([TextSource(str(args.calib_file))], tokenizer, NUM_SAMPLES, SEQLEN, args.seed)
    tokens = file_tokens(tokenizer, args.eval_file)
    windows = eval_windows(tokens, EVAL_SEQLEN, str(args.eval_file))[:EVAL_WINDOWS]
    short_windows = random_windows(tokens, NUM_WINDOWS, WINDOW_TOKENS, args.seed, str(args.eval_file))

    def dense_model() -> PreTrainedModel:
        return repeat_kv_heads(load_model(args.model, "float32", False))

    dense_norms, rows = largest_norms(dense_model(), short_windows), []
    for share in args.shares:
        for count in (0, BEST_SINK_WINDOWS):
            model, start = dense_model(), time.perf_counter()
            config = replace(FINE, target_ratio=share, sink_windows=count, **LOG_INCREASE)
            prune_with(config, model, data.samples)
            row: dict[str, Any] = {"share": share, "text_starts": count}
            row["seconds"] = round(time.perf_counter() - start, 1)
            row["lost"] = (largest_norms(model, short_windows) < LOST * dense_norms).double().mean().item()
            row["perplexity"] = perplexity(model, windows, 2)
            logger.info("%s", row)
            rows.append(row)
    protocol = {"calibration": [NUM_SAMPLES, SEQLEN], "seed": args.seed, "beginnings": [NUM_WINDOWS, WINDOW_TOKENS]}
    protocol |= {"percdamp": PERCDAMP, "evaluation": [EVAL_WINDOWS, EVAL_SEQLEN]}
    write_json_atomic(args.out, {"command": command_line(), **environment(CPU), "protocol": protocol, "rows": rows})
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The table in docs/results.md."""
    lines = []
    for row in rows:
        figures = (f"{100 * row['lost']:.2f} %", f"{row['perplexity']:.2f}", f"{row['seconds']:.0f}")
        lines.append((f"{100 * row['share']:.0f} %", row["text_starts"], *figures))
    return markdown_table(("removed", "sink windows", "first tokens lost", "perplexity", "seconds"), lines)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "text_starts.py")
