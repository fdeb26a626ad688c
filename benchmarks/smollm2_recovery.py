"""The whole recipe on SmolLM2-135M: dense, pruned, and after LoRA; perplexity and zero-shot accuracy of each.

    python -m benchmarks.smollm2_recovery MODEL --calib_file wikitext2/valid.raw.txt \
        --eval_file wikitext2/test.raw.txt --alpaca_file alpaca/stanford_original.jsonl --task_dir tasks \
        --work_dir recovery --out benchmarks/results/smollm2_recovery.json

Runs the command lines of the three stages as a user would. Pruning: whole kv groups, 32 × 512 tokens,
log_increase from 0.0625, damping 0.01. LoRA: the defaults, bf16 products, batches of 16, cosine from 1e-4. Perplexity:
the first 300,000 characters of the evaluation text, and the last 200 rows of the instructions, which are not trained
on. What is finished in --work_dir is not run again.
"""

import argparse
import json
import logging
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.smollm2_perplexity import MIN_SPARSITY, NUM_SAMPLES, PERCDAMP, SEQLEN, ratios_for_share
from ppl_eval.ppl_dataset import load_eval_sets
from ppl_eval.ppl_eval import evaluate
from slim_utils.cli import ArgumentParser, command_line, run_cli
from slim_utils.errors import UserError
from slim_utils.model_io import choose_device, load_model, load_tokenizer, write_json_atomic
from slim_utils.run_record import environment
from slim_utils.walk_settings import WalkSettings

logger = logging.getLogger("smollm2_recovery")

TASKS = ("openbookqa", "arc_easy", "winogrande", "piqa")
EVAL_CHARS, HELD_OUT_ROWS = 300_000, 200
EVAL_SEQLENS = (128, 2048)
BATCH, LEARNING_RATE, MAX_LENGTH = 16, 1e-4, 256
GQA_UNIT = "kv_group"


def build_parser() -> argparse.ArgumentParser:
    """The flags; the protocol itself is fixed."""
    parser = ArgumentParser(prog="smollm2_recovery.py", description="SmolLM2-135M: dense, pruned, after LoRA.")
    parser.add_argument("model", help="SmolLM2-135M as a checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_file", type=Path, required=True)
    parser.add_argument("--alpaca_file", type=Path, required=True, help="jsonl")
    parser.add_argument("--task_dir", type=Path, required=True, help="local rows of the four tasks")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.33])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit", type=int, default=200, help="rows of a task")
    parser.add_argument("--out", type=Path, required=True, help="json to write")
    return parser


def prepare_texts(args: argparse.Namespace) -> dict[str, Path]:
    """The texts of the protocol, cut from the files given."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    rows = args.alpaca_file.read_text(encoding="utf-8").splitlines(keepends=True)
    contents = {
        "train.jsonl": "".join(rows[:-HELD_OUT_ROWS]),
        "held_out.jsonl": "".join(rows[-HELD_OUT_ROWS:]),
        "evaluation.txt": args.eval_file.read_text(encoding="utf-8")[:EVAL_CHARS],
    }
    for name, content in contents.items():
        (args.work_dir / name).write_text(content, encoding="utf-8")
    return {name.partition(".")[0]: args.work_dir / name for name in contents}


def run(*words: Any) -> None:
    """One command line of the suite.

    Raises:
        UserError: if it fails; it has said why.
    """
    command = list(map(str, words))
    logger.info("%s", " ".join(command))
    if subprocess.run([sys.executable, *command], check=False).returncode != 0:
        raise UserError(f"{command[0]} failed")


def words(flags: dict[str, Any]) -> list[Any]:
    """Flags and values one after the other."""
    return list(chain.from_iterable(flags.items()))


def finished(folder: Path) -> bool:
    """Whether a stage has written ``folder`` to its end."""
    record = folder / "run.json"
    return record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("finished", True)


def zero_shot(args: argparse.Namespace, model: Path | str, name: str) -> dict[str, Any]:
    """Results, averages and sample counts of ``model``."""
    path = args.work_dir / f"{name}.zero_shot.json"
    if not path.exists():
        flags = ["--tasks", ",".join(TASKS), "--data_dir", args.task_dir, "--limit", args.limit, "--batch_size", "auto"]
        run("model_evaluate.py", "--model", model, *flags, "--output_path", path)
    record = json.loads(path.read_text(encoding="utf-8"))
    return {key: record[key] for key in ("results", "averages", "samples", "splits")}


def prune(args: argparse.Namespace, share: float) -> Path:
    """The small model of ``share``."""
    folder = args.work_dir / f"pruned_{share:g}"
    if not finished(folder):
        settings = WalkSettings(torch.device("cpu"), torch.device("cpu"), gqa_unit=GQA_UNIT)
        top = ratios_for_share(load_model(args.model, "auto", False), share, settings)[-1]
        flags = {"--data_file": args.calib_file, "--num_samples": NUM_SAMPLES, "--seqlen": SEQLEN}
        flags |= {"--percdamp": PERCDAMP, "--min_sparsity": MIN_SPARSITY, "--max_sparsity": f"{top:.4f}"}
        flags["--gqa_unit"] = GQA_UNIT
        switches = ["--non_uniform", "--skip_evaluate", "--save_pruned_weights"]
        run("model_slimming.py", args.model, *words(flags), *switches, "--save_dir", folder)
    return folder / "pruned_weights"


def finetune(args: argparse.Namespace, model: Path, texts: dict[str, Path], share: float) -> dict[str, Any]:
    """``run.json`` of the LoRA run on the model pruned by ``share``; the fused model is beside it."""
    folder = args.work_dir / f"lora_{share:g}"
    if not finished(folder):
        flags = {"--data_path": texts["train"], "--max_length": MAX_LENGTH, "--val_dataset_size": 0}
        flags |= {"--use_lora": "true", "--bf16": "true", "--cache_dataset": "false", "--save_strategy": "no"}
        flags |= {"--learning_rate": LEARNING_RATE, "--lr_scheduler_type": "cosine", "--warmup_steps": 5}
        flags |= {"--max_steps": args.steps, "--per_device_train_batch_size": BATCH, "--logging_steps": 5}
        flags |= {"--extra_val_set": ",".join(eval_specs(texts)), "--overwrite": "true"}
        lengths = ["--eval_seqlens", *EVAL_SEQLENS]
        run("model_finetune.py", "--model_name_or_path", model, *words(flags), *lengths, "--output_dir", folder)
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def eval_specs(texts: dict[str, Path]) -> list[str]:
    """The two evaluation texts."""
    return [f"wikitext2={texts['evaluation']}", f"alpaca={texts['held_out']}"]


def measure_share(args: argparse.Namespace, texts: dict[str, Path], share: float) -> list[dict[str, Any]]:
    """The rows *pruned* and *LoRA* of one share."""
    small = prune(args, share)
    record = finetune(args, small, texts, share)
    removed = json.loads((small.parent / "run.json").read_text(encoding="utf-8"))["sizes"]["block_share_removed"]
    rows = []
    for name, model, when in (("pruned", small, "before"), ("LoRA", lora_model(args, share), "after")):
        row = {"model": name, "share_removed": removed, "perplexity": record["perplexity"][when]}
        rows.append(row | {"zero_shot": zero_shot(args, model, f"{name}_{share:g}")})
    rows[1] |= {key: record[key] for key in ("training_seconds", "trained_parameters")}
    rows[1]["loss"] = [{"step": entry["step"], "loss": entry["loss"]} for entry in record["log"] if "loss" in entry]
    return rows


def lora_model(args: argparse.Namespace, share: float) -> Path:
    """The fused model of ``share``."""
    return args.work_dir / f"lora_{share:g}" / "lora_fused_model"


def measure_dense(args: argparse.Namespace, texts: dict[str, Path]) -> dict[str, Any]:
    """The row *dense*."""
    tokenizer, model = load_tokenizer(args.model, False), load_model(args.model, "auto", False)
    windows = load_eval_sets(eval_specs(texts), tokenizer, list(EVAL_SEQLENS), model.config.max_position_embeddings)
    perplexities = evaluate(model, windows)
    return {"model": "dense", "perplexity": perplexities, "zero_shot": zero_shot(args, args.model, "dense")}


def main(args: argparse.Namespace) -> None:
    """Run every stage and write the json."""
    texts = prepare_texts(args)
    rows = [measure_dense(args, texts)]
    for share in args.shares:
        rows += measure_share(args, texts, share)
    result = {
        "command": command_line(),
        **environment(choose_device("auto"), "peft", "lm-eval"),
        "protocol": {
            "calibration": {"num_samples": NUM_SAMPLES, "seqlen": SEQLEN, "seed": 0, "percdamp": PERCDAMP},
            "lora": {"steps": args.steps, "batch": BATCH, "learning_rate": LEARNING_RATE, "max_length": MAX_LENGTH},
            "lora_seed": 42,
            "evaluation_characters": EVAL_CHARS,
            "held_out_rows": HELD_OUT_ROWS,
            "zero_shot_limit": args.limit,
        },
        "rows": rows,
    }
    write_json_atomic(args.out, result)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "smollm2_recovery.py")
