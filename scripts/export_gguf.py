"""Export a dense or pruned checkpoint to a GGUF file for llama.cpp, with a Modelfile for Ollama beside it.

python scripts/export_gguf.py OUT/pruned_weights pruned.gguf --outtype q8_0
ollama create pruned -f pruned.gguf.Modelfile
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.adapters import FUSED_FOLDER, merged_models
from slim_utils.common.atomic_output import atomic_file, check_output_file, write_text_atomic
from slim_utils.common.errors import UserError
from slim_utils.common.input_paths import check_inputs_outside
from slim_utils.common.loading import PRUNED_MODEL_FOLDER, load_config, load_model, load_tokenizer
from slim_utils.export.gguf import OUTTYPES, check_exportable, export_gguf
from slim_utils.export.gguf_tokenizer import read_vocabulary
from slim_utils.export.ollama import modelfile, modelfile_path, stop_texts

# The first bytes of every GGUF file, and of every Modelfile.
GGUF_MAGIC, MODELFILE_MAGIC = b"GGUF", b"FROM "

logger = logging.getLogger("export_gguf")

# Checkpoints inside the output folder of a run: the pruned model, and the base with fused adapters.
INNER_FOLDERS = (PRUNED_MODEL_FOLDER, FUSED_FOLDER)


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="export_gguf.py", description="Export a checkpoint to GGUF.")
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument(
        "--outtype", choices=OUTTYPES, default="f16", help="type of the matrices (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def folder_name(model: str) -> str:
    """Name of a checkpoint: its folder or hub name, or the output folder of the run for ``INNER_FOLDERS``."""
    path = Path(model).resolve()
    return path.parent.name if path.name in INNER_FOLDERS else path.name


def check_replaceable(out: Path, magic: bytes, kind: str) -> None:
    """Check that ``--overwrite`` would replace an earlier export, not another file.

    Raises:
        UserError: if ``out`` exists and does not begin with ``magic``, as a ``kind`` does.
    """
    if out.is_file():
        with out.open("rb") as file:
            if file.read(len(magic)) != magic:
                raise UserError(f"OUT {out}: not a {kind}; not overwritten")


def main(args: argparse.Namespace) -> None:
    """Check the flags, load the model, and write the files atomically."""
    check_output_file(args.out, args.overwrite, "OUT")
    check_inputs_outside(args.out, "OUT", {"MODEL": merged_models(args.model)})
    check_replaceable(args.out, GGUF_MAGIC, "GGUF file")
    check_output_file(modelfile_path(args.out), args.overwrite, "OUT")
    check_replaceable(modelfile_path(args.out), MODELFILE_MAGIC, "Modelfile")
    config = load_config(args.model, trust_remote_code=False)
    check_exportable(config, args.outtype)
    tokenizer = load_tokenizer(args.model, trust_remote_code=False)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, args.model)
    model = load_model(args.model, "auto", trust_remote_code=False)
    with atomic_file(args.out) as partial:
        export_gguf(model, tokenizer, vocabulary, partial, args.outtype, folder_name(args.model))
    write_text_atomic(modelfile_path(args.out), modelfile(args.out, stop_texts(model, tokenizer)))
    logger.info("saved %s: %.1f MiB", args.out, args.out.stat().st_size / (1 << 20))


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "export_gguf.py", output_flag="OUT")
