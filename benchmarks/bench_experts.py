"""Whole experts against FFN columns at equal size, on a tiny mixture of experts that is trained first.

    python -m benchmarks.bench_experts MODEL --train_files wikitext2/train.tokens.txt \
        --calib_file wikitext2/valid.tokens.txt --eval_files wikitext2=wikitext2/test.tokens.txt c4=c4/sample.jsonl \
        ptb=ptb/valid.txt --out benchmarks/results/bench_experts.json

MODEL is a folder; a model that is there already is not trained again. Protocol: a Mixtral of 4 layers with 8 experts,
two of them per token, on bytes, in fp32; AdamW with a cosine schedule and the balancing loss of the library. 2, 3 and 4
experts of every layer are removed, by REAP scores alone and with the refit. With ``columns``, every expert loses
columns of as many weights; with ``heads and columns``, the default unit, heads lose the same ratio as columns, up to
the same share of the block weights. Calibration: 64 × 256 bytes, damping 0.01, two draws. Perplexity per byte of the
first 64 windows of 256 bytes of texts that are in neither training nor calibration. Rows that are already in --out are
not measured again.
"""

import argparse
import logging
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_quality import planner
from benchmarks.measuring import measure_missing_rows, named_files
from ppl_eval.ppl_dataset import eval_windows
from ppl_eval.ppl_eval import perplexity
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.loading import load_model
from slim_utils.families import find_family
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.masks import LayerPlan
from slim_utils.profiling.model_stats import removed_share
from slim_utils.profiling.tables import markdown_table
from slim_utils.pruning_config import PruningConfig
from slim_utils.slim_dataset import random_windows
from slim_utils.text_source import file_documents, join_documents

logger = logging.getLogger("bench_experts")

CONFIG = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.02,
}
STEPS, BATCH, SEQLEN, LEARNING_RATE, WARMUP = 900, 8, 256, 3e-3, 50
NUM_SAMPLES, EVAL_WINDOWS, PERCDAMP = 64, 64, 0.01
REMOVED, SEEDS = (2, 3, 4), (0, 1)
BASE = PruningConfig(device="cpu", cache_dev="cpu", percdamp=PERCDAMP)
DENSE, REAP, REFIT, COLUMNS, BOTH = "dense", "REAP", "REAP and refit", "columns", "heads and columns"


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="bench_experts.py", description="Whole experts and columns at equal size.")
    parser.add_argument("model", type=Path, help="folder of the trained model, written if it does not exist")
    parser.add_argument("--train_files", nargs="+", type=Path, required=True)
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_files", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def file_bytes(file: Path) -> Tensor:
    """The bytes (n,) of the text of a file as token ids."""
    text = join_documents(file_documents(file)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(files: list[Path], steps: int = STEPS) -> MixtralForCausalLM:
    """A mixture of experts trained on random windows of ``files``."""
    torch.manual_seed(0)
    tokens = torch.cat([file_bytes(file) for file in files])
    model = MixtralForCausalLM._from_config(MixtralConfig(**CONFIG), experts_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        batch = random_windows(tokens, BATCH, SEQLEN, step, "--train_files")
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            logger.info("step %d: loss %.3f", step, loss.item())
    return model.eval()


def plans_of(method: str, removed: int, model: PreTrainedModel, share: float) -> list[LayerPlan]:
    """The plan of every layer by which ``method`` removes ``share``, the weights of ``removed`` experts."""
    if method == BOTH:
        return planner(replace(BASE, target_ratio=share), model).plans()
    columns = CONFIG["intermediate_size"] * removed // CONFIG["num_local_experts"]
    plan = LayerPlan(columns=columns) if method == COLUMNS else LayerPlan(experts=removed)
    return [plan] * CONFIG["num_hidden_layers"]


def measure(
    path: Path, calibration: Tensor, sets: dict[str, Tensor], method: str, removed: int, seed: int
) -> dict[str, Any]:
    """One row: the model pruned by ``method`` to the size without ``removed`` experts of every layer."""
    model = load_model(str(path), "float32", False)
    model.set_experts_implementation("eager")
    family, share, seconds = find_family(model.config), 0.0, 0.0
    if removed:
        run = planner(replace(BASE, expert_unit="expert", no_compensate=method == REAP), model)
        layers = family.decoder_layers(model)
        size = [run.settings.size_mask(shape, LayerPlan(experts=removed)) for shape in run.shapes]
        plans = plans_of(method, removed, model, removed_share(layers, family, size))
        samples = random_windows(calibration, NUM_SAMPLES, SEQLEN, seed, "--calib_file")
        start = time.perf_counter()
        masks, _ = prune_layers(model, family, samples, plans, run.settings)
        seconds, share = time.perf_counter() - start, removed_share(layers, family, masks)
    row: dict[str, Any] = {"unit": method, "experts_removed": removed, "seed": seed, "share": round(share, 4)}
    row |= {
        "seconds": round(seconds, 1),
        "perplexity": {name: perplexity(model, set_, 8) for name, set_ in sets.items()},
    }
    logger.info("%s, %d experts, seed %d: %s", method, removed, seed, row["perplexity"])
    return row


def main(args: argparse.Namespace) -> None:
    """Train the model unless it is there, measure the missing rows and print the table."""
    if not args.model.exists():
        train(args.train_files).save_pretrained(args.model)
    files = named_files("--eval_files", args.eval_files)
    sets = {name: eval_windows(file_bytes(file), SEQLEN, str(file))[:EVAL_WINDOWS] for name, file in files.items()}
    protocol = {"config": CONFIG, "training": [STEPS, BATCH, SEQLEN, LEARNING_RATE], "percdamp": PERCDAMP}
    protocol |= {"calibration": [NUM_SAMPLES, SEQLEN], "evaluation": [EVAL_WINDOWS, SEQLEN]}
    methods = (REAP, REFIT, COLUMNS, BOTH)
    keys = [(DENSE, 0, 0)]
    keys += [(method, removed, seed) for seed in SEEDS for removed in REMOVED for method in methods]
    names = ("unit", "experts_removed", "seed")
    work = partial(measure, args.model, file_bytes(args.calib_file), sets)
    print(table(measure_missing_rows(args.out, protocol, names, keys, work)))


def table(record: dict[str, Any]) -> str:
    """The table in docs/results.md: mean ± standard deviation over the draws."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((row["experts_removed"], row["unit"]), []).append(row)
    lines = []
    for (removed, method), rows in sorted(groups.items(), key=lambda group: group[0][0]):
        figures = []
        for text in rows[0]["perplexity"]:
            values = [row["perplexity"][text] for row in rows]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            figures.append(f"{mean(values):.3f}{spread}")
        share = f"{100 * rows[0]['share']:.1f} %"
        lines.append((f"{removed} of {record['protocol']['config']['num_local_experts']}", share, method, *figures))
    texts = [f"{text}" for text in record["rows"][0]["perplexity"]]
    return markdown_table(("experts' weights", "removed", "unit", *texts), lines)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "bench_experts.py")
