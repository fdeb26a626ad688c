"""Start-up of the entry scripts: packages that take seconds to import are not imported before the flags are checked."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ("datasets", "pandas", "pyarrow", "lm_eval")
TRAINING = ("transformers.trainer",)
MODELING = ("models.modeling_slim_llama", "transformers.modeling_utils", "torch._dynamo", "sympy")
# Script, module of its parser, packages that must not be imported. The Trainer's arguments import modeling code.
PARSERS = [
    ("model_slimming", "model_slimming", (*DATA, *TRAINING, "peft", *MODELING)),
    ("model_evaluate", "model_evaluate", (*DATA, *TRAINING, "peft", *MODELING)),
    ("test_flops", "test_flops", (*DATA, *TRAINING, "peft", *MODELING)),
    ("model_finetune", "train_utils.finetune_args", (*DATA, *TRAINING, "models.modeling_slim_llama")),
]


@pytest.mark.parametrize(("script", "module", "absent"), PARSERS)
def test_build_parser_heavy_packages_not_imported(script, module, absent):
    code = f"import sys, {script}; from {module} import build_parser; build_parser(); print(*sys.modules)"
    # Not in a fork of the tests' server, which has already imported the packages.
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(absent) & set(process.stdout.split())
