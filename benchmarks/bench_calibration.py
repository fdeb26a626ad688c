"""Effect of the calibration text, the number of samples and their length on the pruned model.

    python -m benchmarks.bench_calibration SmolLM2-135M-Instruct --calib_files wikitext2=wikitext2/valid.tokens.txt \
        c4=c4/sample.jsonl alpaca=alpaca/stanford_original.jsonl --mixtures wikitext2+c4 \
        --eval_files wikitext2=wikitext2/test.tokens.txt c4=c4/sample.jsonl ptb=ptb/valid.txt \
        --out benchmarks/results/bench_calibration.json

Protocol: fp32, multi-head attention, 20 % of the block weights removed, log_increase from 0.0625, exact head scores,
groups of 32 columns, damping 0.01. Calibration: random windows (--seed) that skip the first 16384 tokens of the text,
since evaluation uses the first 8 × 1024 tokens; 32 × 512 tokens of each text and of each mixture and, for the first
text, other numbers and lengths of samples. Rows that are already in --out are not measured again.
"""

import argparse
import logging
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_quality import EVAL_SEQLEN, EVAL_WINDOWS, FINE, LOG_INCREASE, prune_with
from benchmarks.measuring import eval_sets, file_tokens, measure_missing_rows, named_files
from benchmarks.smollm2_perplexity import NUM_SAMPLES, PERCDAMP, SEQLEN, repeat_kv_heads
from ppl_eval.ppl_eval import perplexity
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model, load_tokenizer
from slim_utils.profiling.tables import markdown_table
from slim_utils.slim_dataset import random_windows
from slim_utils.text_mixture import parse_text_source, shares

logger = logging.getLogger("bench_calibration")

SHARE, SKIPPED = 0.2, 16384
# Number and length of the samples of the first text.
SIZES = ((8, 512), (128, 512), (128, 128), (8, 2048))


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="bench_calibration.py", description="Perplexity by calibration data.")
    parser.add_argument("model", help="SmolLM2-135M as a checkpoint folder")
    parser.add_argument("--calib_files", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--eval_files", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument(
        "--mixtures", nargs="*", default=[], metavar="NAME+NAME", help="of calibration texts, each NAME or NAME:WEIGHT"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def measure(
    args: argparse.Namespace, files: dict[str, Path], sets: dict[str, Tensor], text: str, num_samples: int, seqlen: int
) -> dict[str, Any]:
    """One row: calibrated on the file or the mixture ``text`` of ``files``, evaluated on the windows ``sets``."""
    tokenizer, draws = load_tokenizer(args.model, False), []
    sources = [parse_text_source("--mixtures", part) for part in text.split("+")]
    for source, count in zip(sources, shares([source.weight for source in sources], num_samples), strict=True):
        tokens = file_tokens(tokenizer, files[source.name])
        draws.append(random_windows(tokens[SKIPPED:], count, seqlen, args.seed, source.name))
    samples = torch.cat(draws)
    model = repeat_kv_heads(load_model(args.model, "float32", False))
    start = time.perf_counter()
    prune_with(replace(FINE, target_ratio=SHARE, **LOG_INCREASE), model, samples)
    seconds = round(time.perf_counter() - start, 1)
    row = {"text": text, "num_samples": num_samples, "seqlen": seqlen, "seed": args.seed, "seconds": seconds}
    row["perplexity"] = {name: perplexity(model, windows, 2) for name, windows in sets.items()}
    logger.info("%s, %d × %d tokens: %s", text, num_samples, seqlen, row["perplexity"])
    return row


def main(args: argparse.Namespace) -> None:
    """Measure the missing rows and print the table."""
    files = named_files("--calib_files", args.calib_files)
    sets = eval_sets(load_tokenizer(args.model, False), args.eval_files, EVAL_WINDOWS, EVAL_SEQLEN)
    protocol = {"share": SHARE, "evaluation": [EVAL_WINDOWS, EVAL_SEQLEN], "percdamp": PERCDAMP, "skipped": SKIPPED}
    protocol |= {"seed": args.seed, "texts": sorted(args.calib_files + args.eval_files)}
    first = next(iter(files))
    for text in args.mixtures:
        unknown = {parse_text_source("--mixtures", part).name for part in text.split("+")} - files.keys()
        if unknown:
            raise UserError(f"--mixtures {text}: {min(unknown)} is not a name in --calib_files")
    keys = [(text, NUM_SAMPLES, SEQLEN) for text in (*files, *args.mixtures)] + [(first, *size) for size in SIZES]
    names = ("text", "num_samples", "seqlen")
    print(table(measure_missing_rows(args.out, protocol, names, keys, partial(measure, args, files, sets))))


def table(record: dict[str, Any]) -> str:
    """The table in docs/results.md."""
    texts, lines = list(record["rows"][0]["perplexity"]), []
    for row in record["rows"]:
        figures = [f"{row['perplexity'][text]:.2f}" for text in texts]
        size = f"{row['num_samples']} × {row['seqlen']}"
        lines.append((row["text"], size, *figures, f"{row['seconds']:.0f}"))
    return markdown_table(("calibration", "samples × tokens", *texts, "seconds"), lines)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "bench_calibration.py")
