"""A tokenizer, texts and a tiny checkpoint, made on the spot: no test needs a download."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB, make_tiny


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs unless tests that need one are selected: others run two processes, whatever the machine has."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def samples():
    """(8, 16) random token ids."""
    return torch.randint(0, VOCAB, (8, 16), generator=torch.Generator().manual_seed(1))


WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}


def word_tokenizer(words: dict[str, int]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the given words, with a chat template."""
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


def adding_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """``tokenizer`` as one that puts its BOS in front of a text by itself."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of ``VOCAB`` words ``w0``, ``w1``, …, with a chat template."""
    return word_tokenizer(WORDS)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same, which adds a BOS."""
    return adding_bos(word_tokenizer(WORDS))


def random_text(words: int, seed: int = 0) -> str:
    """Text of ``words`` words of the tokenizer."""
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(3, VOCAB)}" for _ in range(words))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text of 4,000 words."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(random_text(4000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A tiny grouped-query LLaMA on disk, with tokenizer and generation config."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = make_tiny("gqa")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def instruction_file(tmp_path_factory) -> Path:
    """48 rows of instruction, input and output; every other one without input."""
    path = tmp_path_factory.mktemp("data") / "alpaca.jsonl"
    rows = [
        {
            "instruction": random_text(5, index),
            "input": random_text(3, index + 100) if index % 2 else "",
            "output": random_text(2 + index % 7, index + 200),
        }
        for index in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Holds the lock of a folder until it is killed.
LOCK_HOLDER = """
import sys, time
from slim_utils.common.output_folder import output_lock
with output_lock(sys.argv[1], "--save_dir"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock_holder() -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Starts a process that holds the lock of an output folder."""
    processes = []

    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", LOCK_HOLDER, str(folder)]
        root = Path(__file__).resolve().parents[1]
        processes.append(subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(params=["tmpfs", "bind"])
def mount_point(request, tmp_path) -> Iterator[Path]:
    """An empty folder that is a mount point: a file system of its own, or a folder of the same one."""
    folder, source = tmp_path / "volume", tmp_path.parent / f"{tmp_path.name}-source"
    folder.mkdir()
    source.mkdir()
    kinds = {"tmpfs": ["-t", "tmpfs", "tmpfs"], "bind": ["--bind", str(source)]}
    mount = ["mount", *kinds[request.param], str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
