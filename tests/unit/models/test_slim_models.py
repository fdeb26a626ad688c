"""The classes that ship inside a pruned checkpoint, also with an old version of transformers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from models import SLIM_CLASSES
from slim_utils.families import FAMILIES, find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink
from tests.conftest import TINY_FAMILIES, make_tiny

ROOT = Path(__file__).resolve().parents[3]


def test_families_have_every_slim_class():
    slim_types = {base_type: config.model_type for base_type, (config, _) in SLIM_CLASSES.items()}
    assert {family.base_type: family.slim_type for family in FAMILIES.values()} == slim_types


@pytest.mark.parametrize("variant", ["gqa", *TINY_FAMILIES])
def test_slim_model_of_a_config_with_gradient_checkpointing_checkpoints_its_layers(variant, tmp_path):
    dense = make_tiny(variant, gradient_checkpointing=True)
    family = find_family(dense.config)
    assert all(layer.gradient_checkpointing for layer in family.decoder_layers(dense))
    masks = [
        LayerMask.from_groups(shape, list(range(shape.num_kv_heads)), list(range(shape.num_columns)))
        for shape in layer_shapes(dense.config)
    ]
    config = shrink(dense, family, masks).config
    # transformers deletes it from the configuration when it builds a model.
    config.gradient_checkpointing = True
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is family.slim_model
    assert all(layer.gradient_checkpointing for layer in family.decoder_layers(model))
    assert not hasattr(model.config, "gradient_checkpointing")


def test_shipped_code_with_an_older_transformers_names_the_needed_version(tmp_path):
    """The code is in a package, as transformers makes one of the code of a checkpoint, with a stub of transformers."""
    shutil.copytree(ROOT / "models", tmp_path / "shipped", ignore=shutil.ignore_patterns("__init__.py", "__pycache__"))
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text('__version__ = "4.57.1"')
    modules = sorted(path.stem for path in (tmp_path / "shipped").glob("modeling_slim_*.py"))
    code = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"shipped.{name}")
    except ImportError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, *modules]
    lines = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(modules) > 10
    assert all("needs transformers >= 5.15" in line and "this is transformers 4.57.1" in line for line in lines), lines
