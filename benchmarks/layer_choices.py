"""What choices inside a layer are worth: the error that pruning leaves on tokens that it was not fitted to.

    python -m benchmarks.layer_choices SmolLM2-135M-Instruct --calib_file wikitext2/valid.tokens.txt \
        --out benchmarks/results/layer_choices.json

The protocol: fp32, plain multi-head attention; layers ``LAYERS`` on the activations of the dense model; a quarter of
the heads, or of the FFN columns, of each goes. Hessians come from 32 windows × 512 tokens of the calibration text, held
out are 8 windows of it that no window of those touches. Error: of the map's outputs, each token's relative to what the
hidden states after the layer are there, since that is what the next norm divides by; mean over tokens. Every choice is
compared with the paper's, layer by layer; the table has the geometric mean of the ratios.
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
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.loading import check_output_file, load_model, load_tokenizer, write_json_atomic
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
    """One map and what it is pruned on.

    Attributes:
        weight: (out, in).
        unit_size: columns of a unit.
        inputs: (tokens, in) of the calibration windows.
        held_out: (tokens, in) of the others.
        scale: (tokens of both,) mean square of the hidden states after the layer.
    """

    weight: Tensor
    unit_size: int
    inputs: Tensor
    held_out: Tensor
    scale: Tensor

    def pruned(
        self, percdamp: float = PERCDAMP, selection: SelectionOptions = PAPER_SELECTION, inputs: Tensor | None = None
    ) -> Tensor:
        """The weight as this suite prunes it."""
        linear = nn.Linear(*self.weight.shape[::-1], bias=False)
        linear.weight.data.copy_(self.weight)
        pruner = SlimGPT(linear)
        pruner.add_batch(self.inputs if inputs is None else inputs)
        pruner.struct_prune(
            round(SHARE * pruner.columns / self.unit_size), self.unit_size, percdamp, selection=selection
        )
        return linear.weight.data

    def errors(self, weight: Tensor, bias: Tensor | float = 0.0) -> tuple[float, float]:
        """Error on the calibration windows and on the others."""
        fitted = len(self.inputs)
        both = zip((self.inputs, self.held_out), (self.scale[:fitted], self.scale[fitted:]), strict=True)
        return tuple(
            ((inputs @ (self.weight - weight).T - bias).square().mean(1) / scale).mean().item()
            for inputs, scale in both
        )


Choice = Callable[[Case], tuple[float, float]]


def by_slimgpt(case: Case, **options: Any) -> tuple[float, float]:
    """This suite's own options."""
    return case.errors(case.pruned(**options))


def relative_damping(case: Case, damping: float) -> tuple[float, float]:
    """Damping of every column as a share of its own energy, not of the mean: as if columns were standardised."""
    energy = case.inputs.square().sum(0)
    phantom = torch.diag((damping * energy).sqrt())
    return case.errors(case.pruned(percdamp=1e-9, selection=GROUPS_OF_16, inputs=torch.cat([case.inputs, phantom])))


def with_bias(case: Case) -> tuple[float, float]:
    """OBS on centred inputs; a bias takes over the mean of what is gone, as in FLAP."""
    mean = case.inputs.mean(0)
    weight = case.pruned(selection=GROUPS_OF_16, inputs=case.inputs - mean)
    return case.errors(weight, (case.weight - weight) @ mean)


def with_swaps(case: Case) -> tuple[float, float]:
    """After the greedy pass: the removed columns that would help most come back, the cheapest of all kept ones go."""
    dense = case.weight.double()
    hessian = (case.inputs.T @ case.inputs).double()
    hessian.diagonal().add_(PERCDAMP * hessian.diagonal().mean())
    weight = case.pruned(selection=GROUPS_OF_16).double()
    for _ in range(SWAP_ROUNDS):
        kept = weight.any(0)
        inner, cross = hessian[kept][:, kept], hessian[kept][:, ~kept]
        residual = (dense - weight) @ hessian[:, ~kept]
        own = hessian.diagonal()[~kept] - (cross * torch.linalg.solve(inner, cross)).sum(0)
        back = (~kept).nonzero().flatten()[(residual.square().sum(0) / own).argsort(descending=True)[:SWAPPED]]
        kept[back] = True
        inverse = torch.linalg.inv(hessian[kept][:, kept])
        fitted = dense @ hessian[:, kept] @ inverse
        greedy_obs(fitted, inverse, len(back), 1, True, selection=SelectionOptions(column_group=1))
        weight = torch.zeros_like(dense)
        weight[:, kept] = fitted
    return case.errors(weight.float())


GROUPS_OF_16 = SelectionOptions(exact_heads=True, column_group=16)
COLUMN_CHOICES: dict[str, Choice] = {
    "the paper's": by_slimgpt,
    "groups of 64": partial(by_slimgpt, selection=SelectionOptions(column_group=64)),
    "groups of 32": partial(by_slimgpt, selection=SelectionOptions(column_group=32)),
    "groups of 16": partial(by_slimgpt, selection=SelectionOptions(column_group=16)),
    "single columns": partial(by_slimgpt, selection=SelectionOptions(column_group=1)),
    "groups of 16, swaps": with_swaps,
}
HEAD_CHOICES: dict[str, Choice] = {
    "the paper's": by_slimgpt,
    "exact heads": partial(by_slimgpt, selection=GROUPS_OF_16),
}
CHOICES: dict[str, Choice] = {
    "bias": with_bias,
    "percdamp 0.001": partial(by_slimgpt, percdamp=0.001, selection=GROUPS_OF_16),
    "percdamp 0.1": partial(by_slimgpt, percdamp=0.1, selection=GROUPS_OF_16),
    "damping by column, 0.03": partial(relative_damping, damping=0.03),
    "damping by column, 0.1": partial(relative_damping, damping=0.1),
    "damping by column, 0.3": partial(relative_damping, damping=0.3),
}


def build_parser() -> argparse.ArgumentParser:
    """The flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="layer_choices.py", description="Error that choices inside a layer leave.")
    parser.add_argument("model", help="SmolLM2-135M as a checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def held_out_windows(tokens: Tensor, samples: Tensor) -> Tensor:
    """Windows (8, seqlen), far apart, that share no stretch of text with ``samples`` (count, seqlen).

    Raises:
        UserError: if the text has too few.
    """
    text = tokens.flatten()
    grams = {tuple(sample[start : start + 8].tolist()) for sample in samples for start in range(SEQLEN - 8)}
    windows = text[: len(text) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    apart = [w for w in windows if not any(tuple(w[i : i + 8].tolist()) in grams for i in range(0, SEQLEN - 8, 8))]
    if len(apart) < HELD_OUT:
        raise UserError(f"--calib_file: {len(apart)} windows are left to hold out of {HELD_OUT}; give more text")
    return torch.stack(apart[:: len(apart) // HELD_OUT][:HELD_OUT])


@torch.no_grad()
def cases(args: argparse.Namespace) -> dict[tuple[int, str], Case]:
    """The heads and the columns of every layer of ``LAYERS``."""
    model, tokenizer = repeat_kv_heads(load_model(args.model, "float32", False)), load_tokenizer(args.model, False)
    tokens = file_tokens(tokenizer, args.calib_file)
    samples = random_windows(tokens, NUM_SAMPLES, SEQLEN, args.seed, str(args.calib_file))
    windows = torch.cat([samples, held_out_windows(tokens, samples)])
    family, settings = find_family(model.config), PruningSettings(CPU, CPU)
    layers = family.decoder_layers(model)
    hidden, calls = capture_layer_kwargs(model, layers, windows, settings)
    found, fitted = {}, samples.numel()
    for index in tqdm(range(max(LAYERS) + 1), desc="layers", unit="layer", disable=None):
        layer, replay = layers[index], LayerForward(layers[index], family, hidden, calls[index], settings)
        if index not in LAYERS:
            replay.advance()
            continue
        inputs = {"heads": torch.cat(list(replay.attention_inputs())).flatten(0, 1)}
        replay.finish_attention()
        inputs["columns"] = torch.cat(list(replay.column_inputs())).flatten(0, 1)
        replay.advance()
        scale = hidden.square().mean(2).flatten()
        for kind, name, size in (
            ("heads", family.attention_out, model.config.head_dim),
            ("columns", family.mlp_out, 1),
        ):
            seen, weight = inputs[kind], layer.get_submodule(name).weight.data
            found[index, kind] = Case(weight, size, seen[:fitted], seen[fitted:], scale)
    return found


def main(args: argparse.Namespace) -> None:
    """Measure all choices."""
    check_output_file(args.out, True, "--out")
    rows = []
    for (layer, kind), case in tqdm(cases(args).items(), desc="choices", unit="map", disable=None):
        own = COLUMN_CHOICES if kind == "columns" else HEAD_CHOICES
        for name, choice in {**own, **CHOICES}.items():
            fitted, held_out = choice(case)
            rows.append({"layer": layer, "kind": kind, "choice": name, "calibration": fitted, "held_out": held_out})
    protocol = {"calibration": [NUM_SAMPLES, SEQLEN], "held_out": [HELD_OUT, SEQLEN], "share": SHARE}
    record = {"command": command_line(), "seed": args.seed, **environment(CPU), "protocol": protocol, "rows": rows}
    write_json_atomic(args.out, record)
    print(table(record))


def table(record: dict[str, Any]) -> str:
    """Errors of every choice as a share of the paper's, geometric means over layers."""
    rows = {(row["kind"], row["choice"], row["layer"]): row for row in record["rows"]}
    lines = []
    for kind, choice in dict.fromkeys((row["kind"], row["choice"]) for row in record["rows"]):
        layers = [layer for of, name, layer in rows if (of, name) == (kind, choice)]
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
