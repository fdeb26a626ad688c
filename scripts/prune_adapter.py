"""Carry a LoRA adapter of the dense model over to the pruned model.

    python scripts/prune_adapter.py ADAPTER OUT/pruned_weights ADAPTER_OF_THE_PRUNED_MODEL

The pruned model's pruning.json says which rows and columns of the adapter belong to it; no weights are loaded. The
adapter's removed rows and columns are dropped, nothing is trained or compensated.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import ADAPTER_CONFIG_NAME

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import atomic_folder, check_output, write_json_atomic
from slim_utils.common.errors import UserError
from slim_utils.common.input_paths import check_inputs_outside
from slim_utils.common.loading import PRUNED_MODEL_FOLDER, load_config
from slim_utils.export.adapter import check_adapter, pruned_adapter
from slim_utils.families import FAMILIES, layer_shapes
from slim_utils.masks import PRUNING_FILE, ModelUnits, read_units

logger = logging.getLogger("prune_adapter")

WEIGHTS_FILE = "adapter_model.safetensors"
MODEL_CONFIG_FILE = "config.json"


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(
        prog="prune_adapter.py", description="Carry a LoRA adapter of the dense model over to the pruned model."
    )
    parser.add_argument("adapter", type=Path, help=f"folder with {ADAPTER_CONFIG_NAME} and {WEIGHTS_FILE}")
    parser.add_argument("pruned", type=Path, help=f"folder of the pruned model, or its {PRUNING_FILE}")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    return parser


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in ``folder``.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"ADAPTER {folder}: no readable {ADAPTER_CONFIG_NAME} ({type(error).__name__})") from None


def read_pruned_units(path: Path) -> tuple[Path, ModelUnits]:
    """The file ``pruning.json`` of the pruned model, and the units of the dense model in it.

    Raises:
        UserError: if it cannot be read, its indices are not those of the dense model, or it lies beside a masked model.
    """
    file = path / PRUNING_FILE if path.is_dir() else path
    units = read_units(file)
    if not units.is_dense:
        raise UserError(f"PRUNED {file}: has no indices into the dense model, but into {units.model}")
    if units.model_type not in FAMILIES:
        raise UserError(f"PRUNED {file}: model type '{units.model_type}' is not supported")
    if (file.parent / MODEL_CONFIG_FILE).is_file():
        shapes = layer_shapes(load_config(str(file.parent), trust_remote_code=False))
        if shapes != units.shapes:
            raise UserError(f"PRUNED {path}: is the masked model; give its {PRUNED_MODEL_FOLDER}")
    return file, units


def main(args: argparse.Namespace) -> None:
    """Check the inputs and write the folder atomically."""
    check_output(args.out, args.overwrite, "OUT", markers=(ADAPTER_CONFIG_NAME,))
    check_inputs_outside(args.out, "OUT", {"ADAPTER": [args.adapter], "PRUNED": [args.pruned]})
    config = read_adapter_config(args.adapter)
    check_adapter(config)
    file, units = read_pruned_units(args.pruned)
    try:
        tensors = load_file(args.adapter / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"ADAPTER {args.adapter}: no readable {WEIGHTS_FILE} ({type(error).__name__})") from None
    pruned = pruned_adapter(tensors, units)
    if (file.parent / MODEL_CONFIG_FILE).is_file():
        config["base_model_name_or_path"] = str(file.parent)
    with atomic_folder(args.out) as folder:
        save_file(pruned, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json_atomic(folder / ADAPTER_CONFIG_NAME, config)
    sizes = (sum(tensor.numel() for tensor in part.values()) for part in (tensors, pruned))
    logger.info("saved %s: %d weights of the adapter, %d before", args.out, *reversed(list(sizes)))


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "prune_adapter.py", output_flag="OUT")
