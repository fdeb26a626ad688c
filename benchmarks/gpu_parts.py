"""Parts of ``gpu_checks.py`` that no other benchmark measures; each writes its result to ``--out``.

    python -m benchmarks.gpu_parts rescue --out rescue.json
    python -m benchmarks.gpu_parts stream --work_dir work --out stream.json
    python -m benchmarks.gpu_parts serving --out serving.json

``rescue`` prunes a model with all of the device's memory, then with less and less of it until the run is short of
memory and goes on with smaller batches, and compares units and errors of the two runs. ``stream`` writes a checkpoint
with random weights and prunes it by ``model_slimming.py --stream``: seconds per layer, seconds to read and transfer the
layers, and how many of these the run waited for. ``serving`` generates with a dense model and one pruned by
log_increase, in turns.

Weights, tokens and texts are random. Without a GPU (rehearsal) one shortage of memory is simulated.
"""

import argparse
import json
import logging
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model_slimming
from benchmarks.bench_prune import SEED, SHAPES, Stopwatch, shape_config
from slim_utils.allocation.planner import plans_of
from slim_utils.allocation.schedules import non_uniform_ratios
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.loading import DTYPES, choose_device
from slim_utils.common.memory import empty_cache
from slim_utils.common.random_model import random_model
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.device_defaults import MAX_TOKENS_PER_FORWARD
from slim_utils.layerwise.layer_forward import LayerForward
from slim_utils.layerwise.layer_report import LayerReport
from slim_utils.layerwise.offload import OffloadedModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask
from slim_utils.pruned_config import slim_config

logger = logging.getLogger("gpu_parts")

# Shares of the unlimited run's peak memory that the limited ones get, until one is rescued.
MEMORY_SHARES = (0.8, 0.65, 0.5, 0.4)
# Units are chosen by errors that differ in rounding between batch sizes; of nearly equal ones another may be removed.
# Differences of errors are relative to those before compensation, of which those after it may be a rounding error.
MIN_EQUAL_UNITS, ERROR_TOLERANCE = 0.999, 1e-4
PROMPT_TOKENS, WARM_UPS = 128, 1
TEXT_WORDS = 1000


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="gpu_parts.py", description="Parts of gpu_checks.py.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", choices=SHAPES, help="shapes (default: by part)")
    parser.add_argument("--layers", type=int, help="number of layers (default: by part)")
    parser.add_argument("--num_samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--new_tokens", type=int, default=64, help="of serving")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="of serving")
    parser.add_argument("--repeats", type=int, default=3, help="of serving")
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "auto"], default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work_dir", type=Path, help="of stream: folder for checkpoints, which are removed afterwards")
    parser.add_argument("--out", type=Path, required=True)
    return parser


@dataclass(frozen=True)
class PruningRun:
    """A pruning run with a limit of memory.

    Attributes:
        masks: mask of every layer.
        reports: report of every layer.
        retries: log lines of retries with less memory.
        peak_bytes: peak memory of the device; 0 on a CPU.
        seconds: duration.
    """

    masks: list[LayerMask]
    reports: list[LayerReport]
    retries: list[str]
    peak_bytes: int
    seconds: float


class _Lines(logging.Handler):
    """Collects log lines about retries."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line about a retry."""
        if "out of device memory" in record.getMessage():
            self.lines.append(record.getMessage())


@contextmanager
def limited_memory(device: torch.device, limit: int | None) -> Iterator[None]:
    """Context in which the process may use ``limit`` bytes of a GPU; on a CPU one forward fails in its place."""
    if limit is None:
        yield
    elif device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        # The index, or None for the current device: a device without one is not accepted here.
        torch.cuda.set_per_process_memory_fraction(limit / total, device.index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device.index)
    else:
        run, failed = LayerForward._run, []

        def fail_once(self: LayerForward, *args: Any) -> Any:
            if not failed:
                failed.append(True)
                raise torch.OutOfMemoryError("simulated")
            return run(self, *args)

        with patch.object(LayerForward, "_run", fail_once):
            yield


def prune_within(args: argparse.Namespace, config: PreTrainedConfig, limit: int | None) -> PruningRun:
    """Prune a random model of ``config`` with ``limit`` bytes of device memory; ``None`` for all."""
    device = args.device
    model = random_model(config, DTYPES[args.dtype], torch.device("cpu"), SEED)
    generator = torch.Generator().manual_seed(SEED)
    samples = torch.randint(0, config.vocab_size, (args.num_samples, args.seqlen), generator=generator)
    # As many tokens at once as the pruner ever takes.
    settings = PruningSettings(device, device, gqa_unit="kv_group", tokens_per_forward=MAX_TOKENS_PER_FORWARD)
    lines, retry_logger = _Lines(), logging.getLogger("slim_utils.layerwise")
    retry_logger.addHandler(lines)
    empty_cache(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        with limited_memory(device, limit):
            plans = plans_of(model, [0.2] * config.num_hidden_layers, settings)
            masks, reports = prune_layers(model, find_family(config), samples, plans, settings)
    finally:
        retry_logger.removeHandler(lines)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return PruningRun(masks, reports, lines.lines, peak, time.perf_counter() - start)


def compared(whole: PruningRun, limited: PruningRun) -> dict[str, Any]:
    """Differences of the figures of two runs, and whether they are equal up to rounding."""
    equal = total = 0
    for one, other in zip(whole.masks, limited.masks, strict=True):
        for units, others in zip(one.kept_units().values(), other.kept_units().values(), strict=True):
            equal, total = equal + len(set(units) & set(others)), total + len(units)
    errors = [
        abs(one.error_compensated - other.error_compensated) / one.error_uncompensated
        for first, second in zip(whole.reports, limited.reports, strict=True)
        for one, other in ((first.attention, second.attention), (first.mlp, second.mlp))
    ]
    same = equal >= MIN_EQUAL_UNITS * total and max(errors) <= ERROR_TOLERANCE
    return {"equal_units": equal / total, "largest_difference_of_errors": max(errors), "equal": same}


def measure_rescue(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of a run that is short of memory, beside those of one that is not.

    Raises:
        UserError: if no limit makes the run short of memory, or the figures differ.
    """
    config = shape_config(args)
    whole = prune_within(args, config, None)
    result: dict[str, Any] = {"peak_bytes": whole.peak_bytes, "seconds": whole.seconds, "limited": []}
    for share in MEMORY_SHARES:
        limit = int(share * whole.peak_bytes)
        try:
            limited = prune_within(args, config, limit)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory with {share:.0%} of {whole.peak_bytes} bytes: not rescued") from error
        row = {"limit_bytes": limit, "seconds": limited.seconds, "retries": limited.retries}
        row |= compared(whole, limited) | {"batch_samples": limited.reports[-1].batch_samples}
        result["limited"].append(row)
        logger.info("%s", row)
        if not row["equal"]:
            raise UserError(f"with {share:.0%} of the memory the figures differ: {row}")
        if limited.retries:
            return result
    raise UserError(f"no run was short of memory, with {MEMORY_SHARES[-1]:.0%} of {whole.peak_bytes} bytes")


def write_random_checkpoint(args: argparse.Namespace, config: PreTrainedConfig, folder: Path) -> Path:
    """Write a checkpoint of ``config`` with random weights and a tokenizer of words; return a text file for it."""
    random_model(config, DTYPES[args.dtype], args.device, SEED).cpu().save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(TEXT_WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    generator, count = random.Random(SEED), (args.num_samples + 1) * args.seqlen
    text = folder.parent / "text.txt"
    text.write_text(" ".join(f"w{generator.randrange(TEXT_WORDS)}" for _ in range(count)), encoding="utf-8")
    return text


def measure_stream(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per layer of a streamed run, and of the transfers that it did not wait for."""
    if args.work_dir is None:
        raise UserError("--work_dir: stream writes checkpoints; give a folder")
    config, read, waited = shape_config(args), [], []
    shutil.rmtree(args.work_dir, ignore_errors=True)
    args.work_dir.mkdir(parents=True)
    try:
        text = write_random_checkpoint(args, config, args.work_dir / "model")
        argv = [args.work_dir / "model", "--data_file", text, "--num_samples", args.num_samples]
        argv += ["--seqlen", args.seqlen, "--sparsity", 0.2, "--stream", "--save_pruned_weights", "--skip_evaluate"]
        argv += ["--device", args.device, "--save_dir", args.work_dir / "out"]
        with (
            patch.object(OffloadedModel, "_read_layer", _timed(OffloadedModel._read_layer, read)),
            patch.object(OffloadedModel, "onload", _timed(OffloadedModel.onload, waited)),
        ):
            start = time.perf_counter()
            model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))
            seconds = time.perf_counter() - start
        record = json.loads((args.work_dir / "out" / "run.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(args.work_dir, ignore_errors=True)
    layers = [layer["seconds"] for layer in record["layers"]]
    # The first layer has nothing to be read behind.
    overlapped = 1 - sum(waited[1:]) / sum(read[1:]) if sum(read[1:]) else 0.0
    return {
        "seconds": seconds,
        "seconds_of_layers": layers,
        "seconds_to_read_a_layer": read,
        "seconds_waited_for_a_layer": waited,
        "share_of_reading_overlapped": max(overlapped, 0.0),
        "layer_bytes": layer_bytes(config, DTYPES[args.dtype]),
        "peak_memory_mib": record["layers"][-1]["peak_memory_mib"],
    }


def layer_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the attention and MLP weights of one layer."""
    shape, hidden = layer_shapes(config)[0], config.hidden_size
    attention = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * hidden
    return (attention + 3 * hidden * shape.num_columns) * dtype.itemsize


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """``function`` with the seconds of every call appended to ``seconds``."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return call


def measure_serving(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of ``generate`` with a dense and a pruned model, in turns."""
    config, device, dtype = shape_config(args), args.device, DTYPES[args.dtype]
    settings = PruningSettings(device, device, gqa_unit="kv_group")
    dense = random_model(config, dtype, device, SEED)
    ratios = non_uniform_ratios("log_increase", 0.0625, 0.25, config.num_hidden_layers)
    shapes, plans = layer_shapes(config), plans_of(dense, ratios, settings)
    masks = [settings.size_mask(shape, plan) for shape, plan in zip(shapes, plans, strict=True)]
    pruned = random_model(slim_config(config, find_family(config), masks), dtype, device, SEED)
    served, watch = {"dense": dense, "pruned": pruned}, Stopwatch(device)
    sizes = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in served.items()}
    runs: dict[tuple[int, str], list[float]] = {key: [] for key in product(args.batch_sizes, served)}
    options = {"do_sample": False, "min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    generator = torch.Generator().manual_seed(SEED)
    for turn in range(WARM_UPS + args.repeats):
        for (batch, name), measured in runs.items():
            prompts = torch.randint(0, config.vocab_size, (batch, PROMPT_TOKENS), generator=generator).to(device)
            start = watch.now()
            served[name].generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options)
            if turn >= WARM_UPS:
                measured.append(batch * args.new_tokens / (watch.now() - start))
    rows = [
        {"batch": batch, "model": name, "tokens_per_second": statistics.median(measured), "runs": measured}
        for (batch, name), measured in runs.items()
    ]
    return {"parameters": sizes, "prompt_tokens": PROMPT_TOKENS, "new_tokens": args.new_tokens, "rows": rows}


# What measures each part, and its default shapes and layers.
PARTS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], str, int]] = {
    "rescue": (measure_rescue, "llama-7b", 2),
    "stream": (measure_stream, "llama-70b", 4),
    "serving": (measure_serving, "llama-7b", 32),
}


def main(args: argparse.Namespace) -> None:
    """Measure a part and write ``--out``."""
    measure, model, layers = PARTS[args.part]
    args.model, args.layers = args.model or model, args.layers or layers
    if args.layers < 2 or args.num_samples < 2:
        raise UserError("--layers and --num_samples: at least 2")
    args.device = choose_device(args.device)
    settings = {name: getattr(args, name) for name in ("model", "layers", "num_samples", "seqlen", "dtype")}
    record = {"command": command_line(), "seed": SEED, **environment(args.device), "settings": settings}
    write_json_atomic(args.out, record | measure(args))


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "gpu_parts.py")
