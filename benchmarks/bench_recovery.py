"""Perplexity after recovery training, by what is trained, by which loss, and on how many tokens.

    python -m benchmarks.bench_recovery SmolLM2-135M-Instruct --calib_file wikitext2/valid.tokens.txt \
        --train_text c4/sample.jsonl wikitext2/train.tokens.txt --alpaca_file alpaca/stanford_original.jsonl \
        --eval_files wikitext2=wikitext2/test.tokens.txt c4=c4/sample.jsonl ptb=ptb/valid.txt \
        --work_dir recovery --out benchmarks/results/bench_recovery.json

Protocol: heads as released, pruned by model_slimming.py on 32 × 512 tokens (seed 0): ``paper`` is log_increase from
0.0625 with the paper's choices, ``best`` is --preset best. Training by model_finetune.py with its defaults for text,
windows of 512 tokens of a mixture of --train_text at equal weights, one epoch; instructions with the paper's recipe
(LoRA of rank 8, 1e-4, batches of 16, up to 256 tokens a row). Perplexity of the first 8 × 1024 tokens of every
evaluation text; training skips windows that overlap with them or with the calibration samples. Nothing is tuned on
these texts; learning rates were chosen by the loss on held-out windows of the training mixture (--learning_rates).

Rows that are already in --out are not measured again, so an interrupted benchmark can be resumed. With --limit,
zero-shot accuracy is measured too.
"""

import argparse
import json
import logging
import math
import sys
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Row, measure_missing_rows, named_files
from benchmarks.smollm2_perplexity import MIN_SPARSITY, NUM_SAMPLES, SEQLEN
from benchmarks.smollm2_recovery import flag_list, is_finished, run, zero_shot
from ppl_eval.ppl_dataset import load_eval_sets
from ppl_eval.ppl_eval import evaluate
from ppl_eval.zero_shot import ACC_NORM_IN_PAPERS
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import num_positions
from slim_utils.common.loading import choose_device, load_model, load_tokenizer
from slim_utils.profiling.tables import markdown_table
from slim_utils.text_source import file_documents, file_rows, join_documents, row_text

logger = logging.getLogger("bench_recovery")

EVAL_WINDOWS, EVAL_SEQLEN = 8, 1024
METHODS = {
    "paper": ["--allocation", "log_increase", "--min_sparsity", MIN_SPARSITY],
    "best": ["--preset", "best"],
}
NONE, DENSE, ALPACA = "none", "dense", "LoRA on instructions"
# Flags of model_finetune.py; those with a teacher get --distill_from.
RECOVERIES: dict[str, dict[str, Any]] = {
    ALPACA: {
        **{"--use_lora": "true", "--learning_rate": 1e-4, "--lr_scheduler_type": "cosine", "--warmup_steps": 5},
        **{"--per_device_train_batch_size": 16, "--max_length": 256, "--val_dataset_size": 0, "--num_train_epochs": 1},
    },
    "cross-entropy, block weights": {"--train": "block_weights"},
    "KL, LoRA": {"--train": "lora"},
    "KL, block weights": {"--train": "block_weights"},
    "KL, scales": {"--train": "scales"},
    "KL, block weights, two rounds": {"--train": "block_weights"},
}
# Recovery on half of the tokens before the model is pruned to its share and recovered on the other half.
TWO_ROUNDS = {"KL, block weights, two rounds": "KL, block weights"}


class Key(NamedTuple):
    """What identifies a row; a learning rate of ``None`` is the default of the recovery."""

    method: str
    share: float
    recovery: str
    tokens: int
    learning_rate: float | None


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="bench_recovery.py", description="Perplexity after recovery training.")
    parser.add_argument("model", help="dense model as a checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--train_text", nargs="+", required=True, help="as --train_text of model_finetune.py")
    parser.add_argument("--alpaca_file", type=Path, help="jsonl, for the recovery on instructions")
    parser.add_argument("--eval_files", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.33, 0.5])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, DENSE], default=[*METHODS, DENSE])
    parser.add_argument("--recoveries", nargs="+", choices=[NONE, *RECOVERIES], default=[NONE, *RECOVERIES])
    parser.add_argument("--tokens", type=int, nargs="+", default=[50_000, 100_000, 250_000, 500_000, 1_000_000])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[None], help="default: that of the recovery")
    parser.add_argument("--task_dir", type=Path, help="local rows of the zero-shot tasks")
    parser.add_argument("--limit", type=int, default=0, help="rows per zero-shot task; 0 skips them")
    parser.add_argument("--bf16", action="store_true", help="train in bf16 mixed precision")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def eval_specs(args: argparse.Namespace) -> list[str]:
    """Specs of files with the first tokens of every evaluation text, written to the work folder."""
    tokenizer, specs = load_tokenizer(args.model, False), []
    for name, file in named_files("--eval_files", args.eval_files).items():
        text = join_documents(file_documents(file))
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False).offset_mapping
        path = args.work_dir / f"{name}.txt"
        # One token more, so that the last window is not cut inside a word.
        path.write_text(text[: offsets[EVAL_WINDOWS * EVAL_SEQLEN][1]], encoding="utf-8")
        specs.append(f"{name}={path}")
    return specs


def alpaca_rows(args: argparse.Namespace, num_tokens: int) -> Path:
    """File with the first rows of the instructions that have ``num_tokens`` tokens together."""
    tokenizer, rows, total = load_tokenizer(args.model, False), [], 0
    for row in file_rows(args.alpaca_file):
        total += len(tokenizer(row_text(row), verbose=False).input_ids)
        if total > num_tokens:
            break
        rows.append(json.dumps(row) + "\n")
    path = args.work_dir / f"alpaca_{num_tokens}.jsonl"
    path.write_text("".join(rows), encoding="utf-8")
    return path


def prune(args: argparse.Namespace, method: str, share: float, model: Path | None = None) -> Path:
    """Folder of the pruned ``model`` (default: the dense one); the dense model itself for the method ``dense``."""
    if method == DENSE:
        return Path(args.model)
    folder = args.work_dir / (f"{method}_{share:g}" if model is None else f"{model.name}_{method}_{share:g}")
    if not is_finished(folder):
        flags = {"--data_file": args.calib_file, "--num_samples": NUM_SAMPLES, "--seqlen": SEQLEN}
        flags |= {"--target_ratio": share, "--save_dir": folder}
        switches = ["--skip_evaluate", "--save_pruned_weights", "--overwrite"]
        run("model_slimming.py", model or args.model, *flag_list(flags), *METHODS[method], *switches)
    return folder / "pruned_weights"


def train_in_rounds(args: argparse.Namespace, specs: list[str], key: Key) -> list[Path]:
    """Output folders of the training; of both rounds, if there are two, which remove the same share of what is left."""
    if key.recovery not in TWO_ROUNDS:
        return [train(args, specs, prune(args, key.method, key.share), key)]
    share, tokens = 1 - (1 - key.share) ** 0.5, key.tokens // 2
    first_key = key._replace(share=share, recovery=TWO_ROUNDS[key.recovery], tokens=tokens)
    first = train(args, specs, prune(args, key.method, share), first_key)
    base = prune(args, key.method, share, first)
    return [first, train(args, specs, base, key._replace(tokens=tokens), skipped_tokens=tokens)]


def train(args: argparse.Namespace, specs: list[str], base: Path, key: Key, skipped_tokens: int = 0) -> Path:
    """Output folder of the training of ``base``."""
    recovery, tokens, rate = key.recovery, key.tokens, key.learning_rate
    name = f"{key.method}_{key.share:g}_{recovery.replace(', ', '_').replace(' ', '_')}_{tokens}"
    folder = args.work_dir / (name if rate is None else f"{name}_{rate:g}")
    if is_finished(folder):
        return folder
    flags = {"--model_name_or_path": base, "--output_dir": folder, "--overwrite": "true", "--save_strategy": "no"}
    flags |= {"--extra_val_set": ",".join(specs), "--extra_val_seqlen": EVAL_SEQLEN, "--eval_seqlens": EVAL_SEQLEN}
    flags |= {"--cache_dataset": "false", "--eval_strategy": "no", **RECOVERIES[recovery]}
    flags |= {} if rate is None else {"--learning_rate": rate}
    # Otherwise a GPU would choose.
    flags |= {"--bf16": str(args.bf16).lower()}
    if recovery == ALPACA:
        run("model_finetune.py", *flag_list(flags), "--data_path", alpaca_rows(args, tokens))
        return folder
    flags |= {"--max_train_tokens": tokens, "--skip_train_tokens": skipped_tokens}
    flags |= {"--distill_from": args.model} if recovery.startswith("KL") else {}
    run("model_finetune.py", *flag_list(flags), "--train_text", *args.train_text)
    return folder


def measure(args: argparse.Namespace, specs: list[str], *values: Any) -> Row:
    """The row of a key with these ``values``: perplexities of a model, and what its training cost."""
    key = Key(*values)
    row: Row = key._asdict()
    if key.recovery == NONE:
        model = prune(args, key.method, key.share)
        tokenizer, loaded = load_tokenizer(args.model, False), load_model(str(model), "auto", False)
        windows = load_eval_sets(specs, tokenizer, [EVAL_SEQLEN], num_positions(loaded.config))
        entries = evaluate(loaded.to(choose_device("auto")), windows)
    else:
        folders = train_in_rounds(args, specs, key)
        records = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in folders]
        record, folder = records[-1], folders[-1]
        entries, fused = record["perplexity"]["after"], folder / "lora_fused_model"
        model = fused if fused.is_dir() else folder
        row |= {name: record[name] for name in ("trained_parameters", "peak_memory_mib", "data")}
        row["training_seconds"] = sum(record["training_seconds"] for record in records)
        row["data"]["sources"] = [Path(source).name for source in row["data"]["sources"]]
        for name, metric in (("loss", "loss"), ("held_out", "eval_validation_loss")):
            row[name] = [[entry["step"], entry[metric]] for entry in record["log"] if metric in entry]
    row["perplexity"] = {entry["dataset"]: entry["perplexity"] for entry in entries}
    if args.limit:
        row["zero_shot"] = zero_shot(args, model, "_".join(model.parts[-2:]))
    logger.info("%s", {key: value for key, value in row.items() if key not in ("loss", "data")})
    return row


def row_keys(args: argparse.Namespace) -> list[Key]:
    """Keys of all rows: models without recovery first, then by the number of tokens."""
    shares = {method: [0.0] if method == DENSE else args.shares for method in args.methods}
    models = list(chain.from_iterable(product([method], shares[method]) for method in args.methods))
    keys = [Key(*model, NONE, 0, None) for model in models if NONE in args.recoveries]
    for tokens, model, recovery, rate in product(args.tokens, models, args.recoveries, args.learning_rates):
        # A dense model is its own teacher.
        if recovery != NONE and not (model[0] == DENSE and recovery.startswith("KL")):
            keys.append(Key(*model, recovery, tokens, rate))
    return keys


def table(rows: list[Row]) -> str:
    """The table in docs/results.md: perplexities and, in parentheses, the loss over dense in nats and as a share.

    The share is that of the loss of the paper's procedure without recovery. Losses are left out where the dense model
    was not measured, and shares where that procedure was not. The loss on the held-out windows of the training texts is
    that before training and the lowest one, with whose weights training ends.
    """
    untrained = {(row["method"], row["share"]): row["perplexity"] for row in rows if row["recovery"] == NONE}
    dense = untrained.get((DENSE, 0.0))
    lines = []
    with_held_out = any(row.get("held_out") for row in rows)
    for row in sorted(rows, key=_order):
        cells = _row_names(row)
        original = untrained.get(("paper", row["share"]))
        for text, value in row["perplexity"].items():
            cell = f"{value:.2f}"
            if dense and row["tokens"] + row["share"]:
                loss = math.log(value / dense[text])
                share = f", {loss / math.log(original[text] / dense[text]):.2f}" if original else ""
                cell += f" ({loss:.3f}{share})"
            cells.append(cell)
        if with_held_out:
            losses = [loss for _, loss in row.get("held_out", [])]
            cells.append(f"{losses[0]:.3f} → {min(losses):.3f}" if losses else "")
        seconds = row.get("training_seconds")
        lines.append((*cells, f"{seconds:.0f}" if seconds else ""))
    header = [*_ROW_NAMES, *rows[0]["perplexity"]]
    return markdown_table((*header, *(["held-out"] if with_held_out else []), "seconds"), lines)


def zero_shot_table(rows: list[Row]) -> str:
    """Zero-shot accuracies in percent with standard errors, and their average as papers take it."""
    lines = []
    for row in sorted(rows, key=_order):
        results: dict[str, dict[str, float]] = row["zero_shot"]["results"]
        metrics = {task: "acc_norm" if task in ACC_NORM_IN_PAPERS else "acc" for task in results}
        scores = [(results[task][metric], results[task][f"{metric}_stderr"]) for task, metric in metrics.items()]
        error = math.hypot(*(error for _, error in scores)) / len(scores)
        scores.append((row["zero_shot"]["averages"]["papers"], error))
        cells = [f"{100 * score:.1f} ± {100 * error:.1f}" for score, error in scores]
        lines.append((*_row_names(row), *cells))
    tasks = rows[0]["zero_shot"]["results"]
    return markdown_table((*_ROW_NAMES, *tasks, "average"), lines)


_ROW_NAMES = ("removed", "pruned by", "recovery", "tokens")


def _row_names(row: Row) -> list[str]:
    """Cells of a row in the columns ``_ROW_NAMES``."""
    return [
        f"{100 * row['share']:.0f} %",
        row["method"],
        row["recovery"] + (f", {row['learning_rate']:g}" if row.get("learning_rate") else ""),
        f"{row['tokens']:,}" if row["tokens"] else "",
    ]


def _order(row: Row) -> tuple[Any, ...]:
    return row["share"], row["method"], row["tokens"], row["recovery"], row.get("learning_rate") or 0


def main(args: argparse.Namespace) -> None:
    """Measure the missing rows."""
    if ALPACA in args.recoveries and not args.alpaca_file:
        raise UserError(f"--alpaca_file: the recovery '{ALPACA}' needs it; add it, or choose other --recoveries")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    protocol = {"model": Path(args.model).name, "calibration": [NUM_SAMPLES, SEQLEN], "seed": 0}
    protocol |= {"evaluation": [EVAL_WINDOWS, EVAL_SEQLEN], "zero_shot_limit": args.limit}
    protocol |= {"train_text": [Path(text).name for text in args.train_text]}
    protocol |= {"bf16": True} if args.bf16 else {}
    measure_row = partial(measure, args, eval_specs(args))
    device = choose_device("auto")
    rows = measure_missing_rows(args.out, protocol, Key._fields, row_keys(args), measure_row, device)["rows"]
    print(table(rows))
    if args.limit:
        print(zero_shot_table(rows))


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "bench_recovery.py")
