"""Pruned checkpoints with quantised weights: perplexity beside fp32, the saved model and what it generates."""

import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from ppl_eval.ppl_dataset import eval_windows, load_eval_tokens
from tests.interop.common import CALIBRATION_TEXT, EVALUATION_TEXT, ROOT, engine, run_engine, smollm2
from tests.interop.served import record_served

PYTHON = ROOT / ".venv-quantisation" / "bin" / "python"
AWQ = "llm-compressor AWQ"
# Bounds of the perplexity as multiples of that of fp32; int4 is rounded to nearest in groups of 32 columns.
WORSE = {
    "torchao int8": 1.1,
    "torchao int4": 1.6,
    "bitsandbytes int8": 1.1,
    "bitsandbytes nf4": 1.6,
    "llm-compressor GPTQ": 1.4,
    AWQ: 1.4,
}
# Columns of pruned maps are multiples of it: on CPUs with AVX512-BF16, bitsandbytes wants rows of whole blocks of NF4.
MULTIPLE = dict.fromkeys(WORSE, 32) | {"bitsandbytes nf4": 64}

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.quantisation,
    pytest.mark.skipif(not PYTHON.exists(), reason="run scripts/test_serving.sh"),
]


class Model(NamedTuple):
    """A checkpoint, and windows for it as json."""

    folder: Path
    tokens: str


def with_windows(folder: Path) -> Model:
    """The checkpoint with windows for calibration and evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def windows(file: Path, count: int) -> list[list[int]]:
        return eval_windows(load_eval_tokens(str(file), tokenizer), 128, "text")[:count].tolist()

    return Model(
        folder, json.dumps({"calibration": windows(CALIBRATION_TEXT, 16), "windows": windows(EVALUATION_TEXT, 8)})
    )


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Callable[[str, int], Model]:
    """SmolLM2 with given shapes and multiples of columns, pruned once."""

    @cache
    def prune(shape: str, multiple: int) -> Model:
        return with_windows(smollm2(shape, tmp_path_factory.mktemp("pruned"), "--multiple_of", str(multiple)))

    return prune


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *(("query heads", kind) for kind in WORSE),
        *product(("kv groups", "stock"), ("torchao int8", "bitsandbytes nf4")),
    ],
)
def test_quantised_model_loads_generates_and_is_saved(pruned, shape, kind, tmp_path):
    folder, tokens = pruned(shape, MULTIPLE[kind])
    got = engine(PYTHON, "quantised_perplexity.py", folder, kind, tmp_path / "quantised", stdin=tokens)
    assert got["fp32"] < got["quantised"] * 1.01 and got["quantised"] < WORSE[kind] * got["fp32"]
    assert got["reloaded"] == pytest.approx(got["quantised"], rel=1e-3)
    assert len(set(got["tokens"])) > 3 and got["bytes"][1] < 0.5 * got["bytes"][0]
    quantiser, _, dtype = kind.rpartition(" ")
    record_served(quantiser, "llama", shape, dtype)


@pytest.mark.parametrize("kind", ["torchao int4", "llm-compressor GPTQ", AWQ])
def test_groups_that_do_not_divide_a_width_are_an_error(pruned, kind, tmp_path):
    folder, tokens = pruned("query heads", 1)
    process = run_engine(PYTHON, "quantised_perplexity.py", folder, kind, tmp_path / "quantised", stdin=tokens)
    assert process.returncode != 0
