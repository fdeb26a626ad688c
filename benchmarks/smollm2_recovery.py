"""Prune, recover, evaluate SmolLM2-135M: dense, pruned, and after LoRA, with and without the dense model as teacher.

    python -m benchmarks.smollm2_recovery MODEL --calib_file wikitext2/valid.raw.txt \
        --eval_file wikitext2/test.raw.txt --alpaca_file alpaca/stanford_original.jsonl --task_dir tasks \
        --work_dir recovery --out benchmarks/results/smollm2_recovery.json

Perplexity and zero-shot accuracy of each, by the command lines of the stages. Pruning: 32 × 512 tokens, whole kv
groups, log_increase from 0.0625, damping 0.01; or a target with --prune_flags. LoRA: defaults, bf16, cosine schedule
from 1e-4, the same batches with and without a teacher. Perplexity: the start of the evaluation text, and the last rows
of the instructions, which are held out. Finished stages in --work_dir are not run again.
"""

import argparse
import json
import logging
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.smollm2_perplexity import MIN_SPARSITY, NUM_SAMPLES, PERCDAMP, SEQLEN, ratios_for_share
from ppl_eval.ppl_dataset import load_eval_sets
from ppl_eval.ppl_eval import evaluate
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import num_positions
from slim_utils.common.loading import choose_device, load_model, load_tokenizer
from slim_utils.layerwise.settings import PruningSettings

logger = logging.getLogger("smollm2_recovery")

TASKS = ("openbookqa", "arc_easy", "winogrande", "piqa")
EVAL_SEQLENS = (128, 2048)
LEARNING_RATE, MAX_LENGTH = 1e-4, 256
GQA_UNIT = "kv_group"
DISTILLED = "LoRA, dense model as teacher"


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="smollm2_recovery.py", description="SmolLM2-135M: dense, pruned, after LoRA.")
    parser.add_argument("model", help="SmolLM2-135M as a checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_file", type=Path, required=True)
    parser.add_argument("--alpaca_file", type=Path, required=True, help="jsonl")
    parser.add_argument("--task_dir", type=Path, required=True, help="local rows of the four tasks")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.33])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=200, help="rows per task; 0 skips zero-shot tasks")
    parser.add_argument("--eval_chars", type=int, default=300_000, help="characters of the evaluation text")
    parser.add_argument("--held_out_rows", type=int, default=200, help="held-out rows at the end of the instructions")
    parser.add_argument("--prune_flags", default="", help="flags of model_slimming.py with a target, in quotes")
    parser.add_argument("--out", type=Path, required=True, help="json to write")
    return parser


def prepare_texts(args: argparse.Namespace) -> dict[str, Path]:
    """Files of the training, held-out and evaluation texts in the work folder, by name."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    rows = args.alpaca_file.read_text(encoding="utf-8").splitlines(keepends=True)
    contents = {
        "train.jsonl": "".join(rows[: len(rows) - args.held_out_rows]),
        "held_out.jsonl": "".join(rows[len(rows) - args.held_out_rows :]),
        "evaluation.txt": args.eval_file.read_text(encoding="utf-8")[: args.eval_chars],
    }
    for name, content in contents.items():
        (args.work_dir / name).write_text(content, encoding="utf-8")
    return {name.partition(".")[0]: args.work_dir / name for name in contents}


def run(*argv: Any) -> None:
    """Run a command line of the suite.

    Raises:
        UserError: if the command fails; it has printed the error.
    """
    command = list(map(str, argv))
    logger.info("%s", " ".join(command))
    if subprocess.run([sys.executable, *command], check=False).returncode != 0:
        raise UserError(f"{command[0]} failed")


def flag_list(flags: dict[str, Any]) -> list[Any]:
    """``flags`` as a list of alternating names and values."""
    return list(chain.from_iterable(flags.items()))


def is_finished(folder: Path) -> bool:
    """Whether a stage has completed its output ``folder``."""
    record = folder / "run.json"
    return record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("finished", True)


def zero_shot(args: argparse.Namespace, model: Path | str, name: str) -> dict[str, Any]:
    """Zero-shot results, averages and sample counts of ``model``."""
    path = args.work_dir / f"{name}.zero_shot.json"
    if not path.exists():
        flags = ["--tasks", ",".join(TASKS), "--data_dir", args.task_dir, "--limit", args.limit, "--batch_size", "auto"]
        run("model_evaluate.py", "--model", model, *flags, "--output_path", path)
    record = json.loads(path.read_text(encoding="utf-8"))
    return {key: record[key] for key in ("results", "averages", "samples", "splits")}


def prune(args: argparse.Namespace, share: float) -> Path:
    """Folder of the model pruned by ``share``."""
    folder = args.work_dir / f"pruned_{share:g}"
    if not is_finished(folder):
        flags = {"--data_file": args.calib_file, "--num_samples": NUM_SAMPLES, "--seqlen": SEQLEN}
        schedule = ["--target_ratio", share, *shlex.split(args.prune_flags)]
        if not args.prune_flags:
            settings = PruningSettings(torch.device("cpu"), torch.device("cpu"), gqa_unit=GQA_UNIT)
            max_sparsity = ratios_for_share(load_model(args.model, "auto", False), share, settings)[-1]
            schedule = ["--percdamp", PERCDAMP, "--gqa_unit", GQA_UNIT, "--non_uniform"]
            schedule += ["--min_sparsity", MIN_SPARSITY, "--max_sparsity", f"{max_sparsity:.4f}"]
        switches = ["--skip_evaluate", "--save_pruned_weights"]
        run("model_slimming.py", args.model, *flag_list(flags), *schedule, *switches, "--save_dir", folder)
    return folder / "pruned_weights"


def finetune(
    args: argparse.Namespace, model: Path, texts: dict[str, Path], folder: Path, *teacher: Any
) -> dict[str, Any]:
    """``run.json`` of the LoRA run with output ``folder``, run if not finished."""
    if not is_finished(folder):
        flags = {"--data_path": texts["train"], "--max_length": MAX_LENGTH, "--val_dataset_size": 0}
        flags |= {"--use_lora": "true", "--bf16": "true", "--cache_dataset": "false", "--save_strategy": "no"}
        flags |= {"--learning_rate": LEARNING_RATE, "--lr_scheduler_type": "cosine", "--warmup_steps": 5}
        flags |= {"--max_steps": args.steps, "--per_device_train_batch_size": args.batch, "--logging_steps": 5}
        flags |= {"--extra_val_set": ",".join(eval_specs(texts)), "--overwrite": "true"}
        more_flags = ["--eval_seqlens", *EVAL_SEQLENS, *teacher]
        run("model_finetune.py", "--model_name_or_path", model, *flag_list(flags), *more_flags, "--output_dir", folder)
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def eval_specs(texts: dict[str, Path]) -> list[str]:
    """Evaluation texts as ``NAME=FILE``."""
    return [f"wikitext2={texts['evaluation']}", f"alpaca={texts['held_out']}"]


def with_zero_shot(args: argparse.Namespace, model: Path | str, file: str, row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with the zero-shot results of ``model`` unless ``--limit 0``; the results are cached as ``file``."""
    return row | ({"zero_shot": zero_shot(args, model, file)} if args.limit else {})


def measure_share(args: argparse.Namespace, texts: dict[str, Path], share: float) -> list[dict[str, Any]]:
    """The rows *pruned*, *LoRA* and *LoRA, dense model as teacher* of one share; same batches, steps and seed."""
    pruned = prune(args, share)
    removed = json.loads((pruned.parent / "run.json").read_text(encoding="utf-8"))["sizes"]["block_share_removed"]
    rows = []
    for name, prefix, teacher in (("LoRA", "lora", ()), (DISTILLED, "taught", ("--distill_from", args.model))):
        folder = args.work_dir / f"{prefix}_{share:g}"
        record = finetune(args, pruned, texts, folder, *teacher)
        if not rows:
            row = {"model": "pruned", "share_removed": removed, "perplexity": record["perplexity"]["before"]}
            rows.append(with_zero_shot(args, pruned, f"pruned_{share:g}", row))
        row = {"model": name, "share_removed": removed, "perplexity": record["perplexity"]["after"]}
        row = with_zero_shot(args, folder / "lora_fused_model", f"{prefix}_{share:g}", row)
        row |= {key: record[key] for key in ("training_seconds", "trained_parameters")}
        row["loss"] = [{"step": entry["step"], "loss": entry["loss"]} for entry in record["log"] if "loss" in entry]
        rows.append(row)
    return rows


def measure_dense(args: argparse.Namespace, texts: dict[str, Path]) -> dict[str, Any]:
    """The row *dense*."""
    tokenizer, model = load_tokenizer(args.model, False), load_model(args.model, "auto", False)
    windows = load_eval_sets(eval_specs(texts), tokenizer, list(EVAL_SEQLENS), num_positions(model.config))
    return with_zero_shot(args, args.model, "dense", {"model": "dense", "perplexity": evaluate(model, windows)})


def main(args: argparse.Namespace) -> None:
    """Run all stages and write ``--out``."""
    texts = prepare_texts(args)
    rows = [measure_dense(args, texts)]
    for share in args.shares:
        rows += measure_share(args, texts, share)
    result = {
        "command": command_line(),
        **environment(choose_device("auto"), "peft", "lm-eval"),
        "protocol": {
            "calibration": {"num_samples": NUM_SAMPLES, "seqlen": SEQLEN, "seed": 0, "percdamp": PERCDAMP},
            "lora": {
                "steps": args.steps,
                "batch": args.batch,
                "learning_rate": LEARNING_RATE,
                "max_length": MAX_LENGTH,
            },
            "lora_seed": 42,
            "evaluation_characters": args.eval_chars,
            "held_out_rows": args.held_out_rows,
            "zero_shot_limit": args.limit,
        },
        "rows": rows,
    }
    write_json_atomic(args.out, result)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "smollm2_recovery.py")
