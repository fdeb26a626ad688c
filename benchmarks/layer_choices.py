"""Effect of choices within a layer: the error of pruning on held-out tokens.

    python -m benchmarks.layer_choices SmolLM2-135M-Instruct --calib_file wikitext2/valid.tokens.txt \
        --out benchmarks/results/layer_choices.json

Protocol: fp32, multi-head attention; layers ``LAYERS`` on the activations of the dense model; a quarter of the heads,
or of the FFN columns, of each layer is removed. Hessians are accumulated on 32 × 512 tokens of the calibration text; 8
windows without overlap with them are held out. The error is that of the outputs of the map, per token relative to the
mean square of the hidden states after the layer (which the next norm divides by), averaged over tokens. Every choice is
compared with the paper's in every layer; the table has the geometric mean of the ratios.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import file_tokens
from benchmarks.smollm2_perplexity import NUM_SAMPLES, PERCDAMP, SEQLEN, repeat_kv_heads
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model, load_tokenizer
from slim_utils.families import find_family
from slim_utils.layerwise.layer_forward import LayerForward, capture_layer_kwargs
from slim_utils.layerwise.offload import CPU
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.obs import PAPER_SELECTION, SelectionOptions, greedy_obs
from slim_utils.profiling.tables import markdown_table
from slim_utils.slim_dataset import random_windows
from slim_utils.slimgpt import SlimGPT

logger = logging.getLogger("layer_choices")

LAYERS = (2, 6, 11, 16, 20, 26)
SHARE = 0.25
HELD_OUT = 8
SWAP_ROUNDS, SWAPPED = 4, 24


@dataclass(frozen=True)
class Case:
    """A linear map with its calibration and held-out inputs.

    Attributes:
        weight: (out, in) weight.
        unit_size: columns per unit.
        inputs: (tokens, in) inputs of the calibration windows.
        held_out: (tokens, in) inputs of the held-out windows.
        scale: (all tokens,) mean square of the hidden states after the layer.
    """

    weight: Tensor
    unit_size: int
    inputs: Tensor
    held_out: Tensor
    scale: Tensor

    def pruned(
        self, percdamp: float = PERCDAMP, selection: SelectionOptions = PAPER_SELECTION, inputs: Tensor | None = None
    ) -> Tensor:
        """The weight, pruned by this suite."""
        linear = nn.Linear(*self.weight.shape[::-1], bias=False)
        linear.weight.data.copy_(self.weight)
        pruner = SlimGPT(linear)
        pruner.add_batch(self.inputs if inputs is None else inputs)
        pruner.struct_prune(
            round(SHARE * pruner.columns / self.unit_size), self.unit_size, percdamp, selection=selection
        )
        return linear.weight.data

    def errors(self, weight: Tensor, bias: Tensor | float = 0.0) -> tuple[float, float]:
        """Errors of ``weight`` on the calibration and on the held-out windows."""
        num_tokens = len(self.inputs)
        splits = ((self.inputs, self.scale[:num_tokens]), (self.held_out, self.scale[num_tokens:]))
        return tuple(
            ((inputs @ (self.weight - weight).T - bias).square().mean(1) / scale).mean().item()
            for inputs, scale in splits
        )


Choice = Callable[[Case], tuple[float, float]]


def slimgpt(case: Case, **options: Any) -> tuple[float, float]:
    """Errors of pruning with options of this suite."""
    return case.errors(case.pruned(**options))


def relative_damping(case: Case, damping: float) -> tuple[float, float]:
    """Errors with damping relative to the energy of each column, as if columns were standardised."""
    energy = case.inputs.square().sum(0)
    extra_rows = torch.diag((damping * energy).sqrt())
    return case.errors(case.pruned(percdamp=1e-9, selection=GROUPS_OF_16, inputs=torch.cat([case.inputs, extra_rows])))


def with_bias(case: Case) -> tuple[float, float]:
    """Errors of OBS on centred inputs, with a bias for the mean of the removed inputs, as in FLAP."""
    mean = case.inputs.mean(0)
    weight = case.pruned(selection=GROUPS_OF_16, inputs=case.inputs - mean)
    return case.errors(weight, (case.weight - weight) @ mean)


def with_swaps(case: Case) -> tuple[float, float]:
    """Errors after rounds of swaps: restore the most useful removed columns, remove the cheapest kept ones."""
    dense = case.weight.double()
    hessian = (case.inputs.T @ case.inputs).double()
    hessian.diagonal().add_(PERCDAMP * hessian.diagonal().mean())
    weight = case.pruned(selection=GROUPS_OF_16).double()
    for _ in range(SWAP_ROUNDS):
        kept = weight.any(0)
        inner, cross = hessian[kept][:, kept], hessian[kept][:, ~kept]
        residual = (dense - weight) @ hessian[:, ~kept]
        schur = hessian.diagonal()[~kept] - (cross * torch.linalg.solve(inner, cross)).sum(0)
        restored = (~kept).nonzero().flatten()[(residual.square().sum(0) / schur).argsort(descending=True)[:SWAPPED]]
        kept[restored] = True
        inverse = torch.linalg.inv(hessian[kept][:, kept])
        fitted = dense @ hessian[:, kept] @ inverse
        greedy_obs(fitted, inverse, len(restored), 1, True, selection=SelectionOptions(column_group=1))
        weight = torch.zeros_like(dense)
        weight[:, kept] = fitted
    return case.errors(weight.float())


GROUPS_OF_16 = SelectionOptions(exact_heads=True, column_group=16)
COLUMN_CHOICES: dict[str, Choice] = {
    "the paper's": slimgpt,
    "groups of 64": partial(slimgpt, selection=SelectionOptions(column_group=64)),
    "groups of 32": partial(slimgpt, selection=SelectionOptions(column_group=32)),
    "groups of 16": partial(slimgpt, selection=SelectionOptions(column_group=16)),
    "single columns": partial(slimgpt, selection=SelectionOptions(column_group=1)),
    "groups of 16, swaps": with_swaps,
}
HEAD_CHOICES: dict[str, Choice] = {
    "the paper's": slimgpt,
    "exact heads": partial(slimgpt, selection=GROUPS_OF_16),
}
CHOICES: dict[str, Choice] = {
    "bias": with_bias,
    "percdamp 0.001": partial(slimgpt, percdamp=0.001, selection=GROUPS_OF_16),
    "percdamp 0.1": partial(slimgpt, percdamp=0.1, selection=GROUPS_OF_16),
    "damping by column, 0.03": partial(relative_damping, damping=0.03),
    "damping by column, 0.1": partial(relative_damping, damping=0.1),
    "damping by column, 0.3": partial(relative_damping, damping=0.3),
}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="layer_choices.py", description="Error of choices within a layer.")
    parser.add_argument("model", help="SmolLM2-135M as a checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def held_out_windows(tokens: Tensor, samples: Tensor) -> Tensor:
    """Spread-out windows (``HELD_OUT``, seqlen) of ``tokens`` that do not overlap with ``samples`` (count, seqlen).

    Raises:
        UserError: if the text has too few such windows.
    """
    text = tokens.flatten()
    grams = {tuple(sample[start : start + 8].tolist()) for sample in samples for start in range(SEQLEN - 8)}
    windows = text[: len(text) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    disjoint = [w for w in windows if not any(tuple(w[i : i + 8].tolist()) in grams for i in range(0, SEQLEN - 8, 8))]
    if len(disjoint) < HELD_OUT:
        raise UserError(f"--calib_file: {len(disjoint)} windows to hold out, but {HELD_OUT} are needed; use more text")
    return torch.stack(disjoint[:: len(disjoint) // HELD_OUT][:HELD_OUT])


@torch.no_grad()
def cases(args: argparse.Namespace) -> dict[tuple[int, str], Case]:
    """Cases of the heads and of the columns of every layer in ``LAYERS``, by layer and kind."""
    model, tokenizer = repeat_kv_heads(load_model(args.model, "float32", False)), load_tokenizer(args.model, False)
    tokens = file_tokens(tokenizer, args.calib_file)
    samples = random_windows(tokens, NUM_SAMPLES, SEQLEN, args.seed, str(args.calib_file))
    windows = torch.cat([samples, held_out_windows(tokens, samples)])
    family, settings = find_family(model.config), PruningSettings(CPU, CPU)
    layers = family.decoder_layers(model)
    hidden, calls = capture_layer_kwargs(model, layers, windows, settings)
    layer_cases, num_tokens = {}, samples.numel()
    for index in tqdm(range(max(LAYERS) + 1), desc="layers", unit="layer", disable=None):
        layer, forward = layers[index], LayerForward(layers[index], family, hidden, calls[index], settings)
        if index not in LAYERS:
            forward.advance()
            continue
        inputs = {"heads": torch.cat(list(forward.attention_inputs())).flatten(0, 1)}
        forward.finish_attention()
        inputs["columns"] = torch.cat(list(forward.column_inputs())).flatten(0, 1)
        forward.advance()
        scale = hidden.square().mean(2).flatten()
        for kind, name, size in (
            ("heads", family.attention_out, model.config.head_dim),
            ("columns", family.mlp_out, 1),
        ):
            activations, weight = inputs[kind], layer.get_submodule(name).weight.data
            calibration, held_out = activations[:num_tokens], activations[num_tokens:]
            layer_cases[index, kind] = Case(weight, size, calibration, held_out, scale)
    return layer_cases


def main(args: argparse.Namespace) -> None:
    """Measure all choices, write ``--out`` and print the table."""
    check_output_file(args.out, True, "--out")
    rows = []
    for (layer, kind), case in tqdm(cases(args).items(), desc="choices", unit="map", disable=None):
        kind_choices = COLUMN_CHOICES if kind == "columns" else HEAD_CHOICES
        for name, choice in {**kind_choices, **CHOICES}.items():
            calibration, held_out = choice(case)
            errors = {"calibration": calibration, "held_out": held_out}
            rows.append({"layer": layer, "kind": kind, "choice": name, **errors})
    protocol = {"calibration": [NUM_SAMPLES, SEQLEN], "held_out": [HELD_OUT, SEQLEN], "share": SHARE}
    record = {"command": command_line(), "seed": args.seed, **environment(CPU), "protocol": protocol, "rows": rows}
    write_json_atomic(args.out, record)
    print(table(record))


def table(record: dict[str, Any]) -> str:
    """Errors of every choice relative to the paper's, geometric means over layers."""
    rows = {(row["kind"], row["choice"], row["layer"]): row for row in record["rows"]}
    lines = []
    for kind, choice in dict.fromkeys((row["kind"], row["choice"]) for row in record["rows"]):
        layers = [layer for row_kind, name, layer in rows if (row_kind, name) == (kind, choice)]
        cells = [
            statistics.geometric_mean(
                rows[kind, choice, layer][text] / rows[kind, "the paper's", layer][text] for layer in layers
            )
            for text in ("calibration", "held_out")
        ]
        lines.append((kind, choice, *(f"{cell:.3f}" for cell in cells)))
    return markdown_table(("pruned", "choice", "error, calibration", "error, held out"), lines)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "layer_choices.py")
