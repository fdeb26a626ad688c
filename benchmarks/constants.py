"""Perplexity with one default changed at a time, on several models.

    python -m benchmarks.constants SmolLM2-135M-Instruct gemma-3-270m --calib_file wikitext2/valid.tokens.txt \
        --eval_files wikitext2=wikitext2/test.tokens.txt c4=c4/sample.jsonl ptb=ptb/valid.txt \
        --out benchmarks/results/constants.json

Protocol: fp32, heads as released; calibration on 32 × 512 tokens; perplexity of the first 4 × 512 tokens of every
evaluation text, with a BOS if the tokenizer adds one, independent of the calibration windows. ``fine`` is log_increase
from 0.0625 with exact head scores and groups of 32 columns; ``search`` replaces log_increase by the sensitivity
analysis. Nothing is tuned on the evaluation texts.

Rows that are already in --out are not measured again, so an interrupted benchmark can be resumed. It measures no times.
"""

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_quality
from benchmarks.bench_quality import LOG_INCREASE, prune_with
from benchmarks.measuring import eval_sets, measure_missing_rows
from benchmarks.smollm2_perplexity import NUM_SAMPLES, SEQLEN
from ppl_eval.ppl_eval import perplexity
from slim_utils.allocation import budget, sensitivity
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.bos import BOS_POLICIES, evaluation_bos
from slim_utils.common.loading import load_model, load_tokenizer
from slim_utils.families import find_family
from slim_utils.masks import LayerMask
from slim_utils.profiling.model_stats import removed_share
from slim_utils.profiling.tables import markdown_table
from slim_utils.pruning_config import SENSITIVITY, PruningConfig
from slim_utils.slim_dataset import load_calibration
from slim_utils.text_mixture import TextSource

logger = logging.getLogger("constants")

EVAL_WINDOWS, EVAL_SEQLEN = 4, 512


@dataclass(frozen=True)
class Variant:
    """A configuration of a pruning run.

    Attributes:
        config: configuration of the run.
        depth_decay: depth decay of the allocation by a sensitivity analysis.
        constants: constants of the sensitivity analysis that differ, by name.
    """

    config: PruningConfig
    depth_decay: float = budget.DEPTH_DECAY
    constants: Mapping[str, float] = field(default_factory=dict)


PAPER, FINE = (replace(config, **LOG_INCREASE) for config in (bench_quality.PAPER, bench_quality.FINE))
SEARCH = replace(bench_quality.FINE, allocation=SENSITIVITY)
# Losses from every token of windows of 512.
WHOLE = {"PROBE_STRIDE": 1, "PROBE_TOKENS": 512}
VARIANTS: dict[str, Variant] = {
    "paper": Variant(PAPER),
    "paper, no BOS": Variant(replace(PAPER, bos="never")),
    "paper, BOS": Variant(replace(PAPER, bos="always")),
    "fine": Variant(FINE),
    "fine, 512 sink windows": Variant(replace(FINE, sink_windows=512)),
    "fine, no BOS": Variant(replace(FINE, bos="never")),
    "fine, no BOS, 512 sink windows": Variant(replace(FINE, bos="never", sink_windows=512)),
    "fine, percdamp 0.001": Variant(replace(FINE, percdamp=0.001)),
    "fine, percdamp 0.1": Variant(replace(FINE, percdamp=0.1)),
    "fine, dynamic groups": Variant(replace(FINE, column_group=0)),
    "search": Variant(SEARCH, constants=WHOLE),
    "search, depth decay 0": Variant(SEARCH, depth_decay=0.0, constants=WHOLE),
    "search, depth decay 3": Variant(SEARCH, depth_decay=3.0, constants=WHOLE),
    "search, reference 0.15": Variant(SEARCH, constants=WHOLE | {"REFERENCE_RATIO": 0.15}),
    "search, reference 0.5": Variant(SEARCH, constants=WHOLE | {"REFERENCE_RATIO": 0.5}),
    "search, every 4th token": Variant(SEARCH, constants=WHOLE | {"PROBE_STRIDE": 4}),
    "search, 2 samples for heads": Variant(SEARCH, constants=WHOLE | {"PROBE_STRIDE": 4, "HEAD_PROBE_SAMPLES": 2}),
    "search, 256 tokens": Variant(SEARCH, constants={"PROBE_STRIDE": 4, "PROBE_TOKENS": 256}),
}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="constants.py", description="Defaults changed one at a time, on several models.")
    parser.add_argument("models", nargs="+", help="checkpoint folders")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_files", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def prune(model: PreTrainedModel, samples: Tensor, share: float, variant: Variant, cache_file: Path) -> list[LayerMask]:
    """Prune ``model`` in place; the sensitivity analysis is cached in ``cache_file``."""
    config = replace(variant.config, target_ratio=share)
    with ExitStack() as changes:
        changes.enter_context(patch.object(budget, "DEPTH_DECAY", variant.depth_decay))
        for constant, value in variant.constants.items():
            changes.enter_context(patch.object(sensitivity, constant, value))
        return prune_with(config, model, samples, {0: cache_file}.get)


def measure(args: argparse.Namespace, folder: Path, model_name: str, share: float, name: str) -> dict[str, Any]:
    """One row; the dense model for share 0."""
    row: dict[str, Any] = {"model": model_name, "share": share, "variant": name}
    model_path = next(path for path in args.models if Path(path).name == model_name)
    model, tokenizer = load_model(model_path, "float32", False), load_tokenizer(model_path, False)
    if share:
        variant = VARIANTS[name]
        data = load_calibration(
            [TextSource(str(args.calib_file))], tokenizer, NUM_SAMPLES, SEQLEN, args.seed, variant.config.bos
        )
        differences = [f"{constant}={value}" for constant, value in variant.constants.items()]
        cache_file = folder / "-".join([model_name, variant.config.bos, *differences])
        masks = prune(model, data.samples, share, variant, cache_file)
        family = find_family(model.config)
        row["calibration_bos"] = data.bos
        row["share_removed"] = removed_share(family.decoder_layers(model), family, masks)
        row["profile"] = [[len(mask.kept_heads), len(mask.kept_columns)] for mask in masks]
    bos = evaluation_bos(tokenizer, BOS_POLICIES[0])[0]
    sets = eval_sets(tokenizer, args.eval_files, EVAL_WINDOWS, EVAL_SEQLEN, bos)
    row["perplexity"] = {text: perplexity(model, windows, batch_size=1) for text, windows in sets.items()}
    logger.info("%s", {key: value for key, value in row.items() if key != "profile"})
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The table in docs/results.md: perplexities and, in parentheses, the loss over dense in nats."""
    dense = {row["model"]: row["perplexity"] for row in rows if row["variant"] == "dense"}
    texts, lines = list(next(iter(dense.values()))), []
    for row in sorted(rows, key=lambda row: (row["model"], row["share"])):
        cells = [f"{row['perplexity'][text]:.2f}" for text in texts]
        if row["share"]:
            losses = [math.log(row["perplexity"][text] / dense[row["model"]][text]) for text in texts]
            cells = [f"{cell} ({loss:.3f})" for cell, loss in zip(cells, losses, strict=True)]
        lines.append((row["model"], f"{100 * row['share']:.0f} %", row["variant"], *cells))
    return markdown_table(("model", "removed", "", *texts), lines)


def main(args: argparse.Namespace) -> None:
    """Measure the missing rows."""
    protocol = {"calibration": [NUM_SAMPLES, SEQLEN], "evaluation": [EVAL_WINDOWS, EVAL_SEQLEN], "seed": args.seed}
    protocol |= {"texts": sorted(spec.partition("=")[0] for spec in args.eval_files)}
    models = [Path(model).name for model in args.models]
    keys = [(model, 0.0, "dense") for model in models]
    keys += [(model, share, name) for share, name, model in product(args.shares, args.variants, models)]
    with tempfile.TemporaryDirectory() as folder:
        names, measure_row = ("model", "share", "variant"), partial(measure, args, Path(folder))
        measure_missing_rows(args.out, protocol, names, keys, measure_row)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "constants.py")
