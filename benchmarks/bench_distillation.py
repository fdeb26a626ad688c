"""Seconds and peak memory of a training step with a teacher: whole logits, and the heads chunk by chunk.

    python -m benchmarks.bench_distillation SmolLM2-135M-Instruct --out benchmarks/results/bench_distillation.json

Protocol: fp32, teacher and student are the same dense model, one batch of random tokens (--batch × --seqlen), forward
and backward of the divergence without optimizer; the weights of the decoder layers are trained. Every row is measured
in its own process, for its peak memory: median of --repeats steps after one that is not counted.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Row, measure_in_new_process
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.loading import load_model, peak_memory_mib
from slim_utils.families import find_family
from slim_utils.layerwise.offload import CPU
from slim_utils.profiling.tables import markdown_table
from train_utils.distillation import ChunkedDivergence, Head, LiveTeacher, target_rows

Step = Callable[[Tensor], Tensor]


def whole_logits(student: PreTrainedModel, teacher: PreTrainedModel) -> Step:
    """The divergence from the logits of all tokens at once."""

    def step(ids: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        predicted = student(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        return functional.kl_div(predicted, target, reduction="sum", log_target=True)

    return step


def chunked(student: PreTrainedModel, teacher: PreTrainedModel) -> Step:
    """The divergence of the suite."""
    head, live_teacher = Head(student), LiveTeacher(teacher)

    def step(ids: Tensor) -> Tensor:
        divergence = live_teacher.targets({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        student(input_ids=ids, use_cache=False, logits_to_keep=1)
        return ChunkedDivergence.apply(head, divergence, target_rows(head.take_hidden(), ids), *head.parameters())

    return step


WAYS = {"whole logits": whole_logits, "chunked": chunked}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="bench_distillation.py", description="Cost of a training step with a teacher.")
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def measure(args: argparse.Namespace) -> Row:
    """The row of one way."""
    student, teacher = (load_model(args.model, "float32", False) for _ in range(2))
    teacher.requires_grad_(False)
    student.requires_grad_(False)
    find_family(student.config).decoder_layers(student).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, student.config.vocab_size, (args.batch, args.seqlen), generator=generator)
    step, seconds = WAYS[args.measure](student, teacher), []
    loaded = peak_memory_mib(CPU)["host"]
    for _ in range(args.repeats + 1):
        student.zero_grad(set_to_none=True)
        start = time.perf_counter()
        step(ids).backward()
        seconds.append(time.perf_counter() - start)
    peak = peak_memory_mib(CPU)["host"]
    median = statistics.median(seconds[1:])
    return {
        "way": args.measure,
        "seconds": round(median, 3),
        "tokens_per_second": round(ids.numel() / median, 1),
        "peak_memory_mib": round(peak),
        "above_loaded_models_mib": round(peak - loaded),
    }


def main(args: argparse.Namespace) -> None:
    """Measure every way and print the table."""
    if args.measure:
        write_json_atomic(args.out, measure(args))
        return
    flags = [args.model, "--batch", args.batch, "--seqlen", args.seqlen, "--repeats", args.repeats]
    rows = [measure_in_new_process(__file__, [*flags, "--measure", way], way) for way in WAYS]
    write_json_atomic(args.out, {"command": command_line(), **environment(CPU), "rows": rows})
    print(markdown_table(tuple(rows[0]), [tuple(row.values()) for row in rows]))


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "bench_distillation.py")
