"""Perplexity of SmolLM2-135M before and after pruning with ``log_increase``, by share of the block weights removed.

    python -m benchmarks.smollm2_perplexity MODEL --calib_file wikitext2/valid.tokens.txt \
        --eval_file wikitext2/test.tokens.txt --shares 0.2 0.33 --out benchmarks/results/smollm2_perplexity.json

Protocol: fp32; calibration on 32 × 512 tokens, random windows with seed 0; perplexity of the first 8 × 1024 tokens of
the evaluation text, no special tokens, 1023 targets per window; ratios from 0.0625 up to the one that removes the
requested share; damping 0.01. Models: as released (grouped-query attention), pruned by kv groups and by query heads,
and with kv heads repeated to multi-head attention.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import file_tokens
from ppl_eval.ppl_dataset import eval_windows
from ppl_eval.ppl_eval import perplexity
from slim_utils.allocation.budget import layer_units
from slim_utils.allocation.planner import plans_of, ratio_plans
from slim_utils.allocation.schedules import non_uniform_ratios
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.loading import choose_device, load_model, load_tokenizer, peak_memory_mib
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.output.run_record import calibration_record
from slim_utils.params_remove import shrink
from slim_utils.profiling.model_stats import count_parameters, removed_share
from slim_utils.slim_dataset import load_calibration
from slim_utils.text_mixture import TextSource

logger = logging.getLogger("smollm2_perplexity")

MIN_SPARSITY = 0.0625
PERCDAMP = 0.01
NUM_SAMPLES, SEQLEN, SEED = 32, 512, 0
# Multi-head attention; grouped-query attention as released, pruned by kv groups or by query heads.
HEADS = ("repeated", "native", "native_query_head")
EVAL_WINDOWS, EVAL_SEQLEN = 8, 1024


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="smollm2_perplexity.py", description="SmolLM2-135M, dense and pruned.")
    parser.add_argument("model", help="SmolLM2-135M as a checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_file", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.33])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="json to write")
    return parser


@torch.no_grad()
def repeat_kv_heads(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """``model`` as multi-head attention, in place: every query head gets its own copy of its key/value head."""
    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = 1
        for linear in (attention.k_proj, attention.v_proj):
            heads = linear.weight.view(-1, config.head_dim, linear.in_features)
            linear.weight = nn.Parameter(heads.repeat_interleave(repeats, dim=0).flatten(0, 1))
            linear.out_features = linear.weight.shape[0]
    return model


def ratios_for_share(model: PreTrainedModel, share: float, settings: PruningSettings) -> list[float]:
    """``log_increase`` ratios from ``MIN_SPARSITY`` that remove a share of the block weights closest to ``share``."""
    family, shapes = find_family(model.config), layer_shapes(model.config)
    units = layer_units(family.decoder_layers(model), family, shapes, settings)

    def ratios(max_sparsity: float) -> list[float]:
        return non_uniform_ratios("log_increase", MIN_SPARSITY, max_sparsity, len(shapes))

    def removed(max_sparsity: float) -> float:
        plans = ratio_plans(ratios(max_sparsity), units)
        masks = [settings.size_mask(shape, plan) for shape, plan in zip(shapes, plans, strict=True)]
        return removed_share(family.decoder_layers(model), family, masks)

    grid = [MIN_SPARSITY + i * 1e-3 for i in range(int((0.95 - MIN_SPARSITY) / 1e-3))]
    return ratios(min(grid, key=lambda max_sparsity: abs(removed(max_sparsity) - share)))


def measure(args: argparse.Namespace, heads: str, share: float | None, eval_set: Tensor) -> dict[str, Any]:
    """One row: the model with ``heads``, dense (``share`` None) or pruned by ``share``."""
    device = choose_device(args.device)
    tokenizer = load_tokenizer(args.model, False)
    model = load_model(args.model, "float32", False)
    if heads == "repeated":
        model = repeat_kv_heads(model)
    row: dict[str, Any] = {"heads": heads, "share_asked": share or 0.0}
    if share is not None:
        data = load_calibration([TextSource(str(args.calib_file))], tokenizer, NUM_SAMPLES, SEQLEN, SEED)
        unit = "query_head" if heads == "native_query_head" else "kv_group"
        settings = PruningSettings(device, device, percdamp=PERCDAMP, gqa_unit=unit)
        ratios = ratios_for_share(model, share, settings)
        family = find_family(model.config)
        start = time.perf_counter()
        masks, _ = prune_layers(model, family, data.samples, plans_of(model, ratios, settings), settings)
        row["pruning_seconds"] = round(time.perf_counter() - start, 1)
        row["min_sparsity"], row["max_sparsity"] = ratios[0], ratios[-1]
        row["share_removed"] = removed_share(family.decoder_layers(model), family, masks)
        row["calibration"] = calibration_record(data)
        model = shrink(model, family, masks)
    row["parameters"] = count_parameters(model)
    row["perplexity"] = perplexity(model.to(device), eval_set, batch_size=2)
    row["peak_memory_mib"] = peak_memory_mib(device)
    logger.info("%s heads, share %.3f: perplexity %.3f", heads, row.get("share_removed", 0.0), row["perplexity"])
    return row


def main(args: argparse.Namespace) -> None:
    """Measure all rows and write ``--out``."""
    tokens = file_tokens(load_tokenizer(args.model, False), args.eval_file)
    eval_set = eval_windows(tokens, EVAL_SEQLEN, str(args.eval_file))[:EVAL_WINDOWS]
    rows = [measure(args, heads, share, eval_set) for heads in args.heads for share in (None, *args.shares)]
    result = {
        "command": command_line(),
        **environment(choose_device(args.device)),
        "protocol": {
            "seed": SEED,
            "percdamp": PERCDAMP,
            "eval_file": args.eval_file.name,
            "eval_windows": EVAL_WINDOWS,
            "eval_seqlen": EVAL_SEQLEN,
        },
        "rows": rows,
    }
    write_json_atomic(args.out, result)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "smollm2_perplexity.py")
