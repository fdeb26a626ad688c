"""The classes that ship inside a pruned checkpoint, also with an old version of transformers."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import models.registry
from models.families import FAMILIES, ROWS
from models.shipped_code import BASE, shipped_code, shipped_wrapper_code
from models.wrappers import WRAPPER_ROWS
from slim_utils.families import LayerShape, find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink
from tests.processes import run_python
from tests.tiny_models import TINY_FAMILIES, make_tiny

ROOT = Path(__file__).resolve().parents[3]


def shapes_of(model: PreTrainedModel) -> list[LayerShape]:
    return layer_shapes(model.config)


@pytest.mark.parametrize(("model_type", "chosen"), [("granitemoehybrid", True), ("llama4_text", False)])
def test_shipped_code_lets_experts_be_chosen_as_the_stock_class_does(model_type, chosen):
    assert ("@use_experts_implementation" in shipped_code(FAMILIES[model_type])) == chosen


@pytest.mark.parametrize("variant", ["gqa", *TINY_FAMILIES])
def test_slim_model_of_a_config_with_gradient_checkpointing_checkpoints_its_layers(variant, tmp_path):
    dense = make_tiny(variant, gradient_checkpointing=True)
    family = find_family(dense.config)
    assert all(layer.gradient_checkpointing for layer in family.decoder_layers(dense))
    masks = [
        LayerMask.from_groups(shape, list(range(shape.num_kv_heads)), list(range(shape.num_columns)))
        for shape in shapes_of(dense)
    ]
    config = shrink(dense, family, masks).config
    # transformers deletes it from the configuration when it builds a model.
    config.gradient_checkpointing = True
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is family.slim_model
    assert all(layer.gradient_checkpointing for layer in family.decoder_layers(model))
    assert not hasattr(model.config, "gradient_checkpointing")


@pytest.mark.parametrize("name", ["llama", "opt", "olmo2"])
def test_shipped_code_is_what_the_suite_uses(name):
    row = FAMILIES[name]
    module = sys.modules[row.slim_model.__module__]
    assert Path(module.__file__).read_text(encoding="utf-8") == shipped_code(row)
    assert type(AutoConfig.for_model(row.slim_type)) is row.slim_config


def test_shipped_code_of_every_row_is_formatted(tmp_path):
    for row in ROWS:
        (tmp_path / f"modeling_{row.slim_type}.py").write_text(shipped_code(row), encoding="utf-8")
    for wrapper in WRAPPER_ROWS:
        (tmp_path / f"modeling_{wrapper.slim_type}.py").write_text(shipped_wrapper_code(wrapper), encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    # Imports follow the check of the version; some classes of transformers have an underscore in their names.
    for command in (["format", "--diff"], ["check", "--ignore", "E402,I001,N801"]):
        command = [*ruff, *command, "--config", ROOT / "pyproject.toml", tmp_path]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize(
    "field",
    [
        {"name": "Llama(object):\n    pass\nclass X"},
        {"name": "Llama-2"},
        {"config_class": "os"},
        {"model_class": "Llama Model"},
        {"causal_class": "NoSuchForCausalLM"},
        {"slim_type": 'slim_x"\nimport os'},
        {"layers": "model.layers[0]"},
        {"heads_fill_hidden": True, "attention_rows": ((')\nimport os"', ("heads",)),)},
        {"head_norms": (("self_attn.q norm", "heads"),)},
    ],
)
def test_shipped_code_names_that_are_no_identifiers_or_classes_are_refused(field):
    with pytest.raises(ValueError, match="is not"):
        shipped_code(replace(FAMILIES["llama"], **field))


def test_import_of_the_suite_imports_no_modeling_code_until_a_family_is_used():
    code = """
import sys
import models, slim_utils.families
from transformers import AutoConfig

def loaded():
    names = [name for name in sys.modules if name.startswith(("transformers.models.", "models."))]
    return sorted(name for name in names if ".modeling_" in name and ".auto." not in name)

assert loaded() == [], loaded()
assert AutoConfig.for_model("slim_llama").model_type == "slim_llama"
assert loaded() == ["models.modeling_slim_llama", "transformers.models.llama.modeling_llama"], loaded()
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_code_file_is_in_the_cache_written_again_if_damaged_and_elsewhere_if_it_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(models.registry, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    file = models.registry._code_file("modeling_a.py", "x = 1")
    assert file.is_relative_to(tmp_path / "modules") and models.registry._code_file("modeling_a.py", "x = 1") == file
    assert models.registry._code_file("modeling_a.py", "x = 2") != file
    file.write_text("x =")
    assert models.registry._code_file("modeling_a.py", "x = 1").read_text() == "x = 1"
    assert [path.name for path in file.parent.iterdir()] == ["modeling_a.py"]
    (tmp_path / "file").touch()
    monkeypatch.setattr(models.registry, "HF_MODULES_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(models.registry.tempfile, "tempdir", str(tmp_path))
    file = models.registry._code_file("modeling_a.py", "x = 1")
    assert file.is_relative_to(tmp_path) and (file.name, file.read_text()) == ("modeling_a.py", "x = 1")


def test_slim_classes_are_made_once():
    assert models.registry.slim_classes(FAMILIES["llama"]) is models.registry.slim_classes(FAMILIES["slim_llama"])


def test_shipped_code_with_an_older_transformers_names_the_needed_version(tmp_path):
    """The code is in a package, as transformers makes one of the code of a checkpoint, with a stub of transformers."""
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "modeling_slim_llama.py").write_text(shipped_code(FAMILIES["llama"]), encoding="utf-8")
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text('__version__ = "4.57.1"')
    command = [sys.executable, "-c", "import shipped.modeling_slim_llama"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "needs transformers >= 5.15" in process.stderr
    assert "this is transformers 4.57.1" in process.stderr.splitlines()[-1]


# The file of a family in checkpoints that hold two files, beside slim_base.py.
EARLIER_FILE = """
from .slim_base import SlimConfigMixin, SlimForCausalLMMixin, SlimModelMixin

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class SlimLlamaConfig(SlimConfigMixin, LlamaConfig):
    model_type = "slim_llama"


class SlimLlamaModel(SlimModelMixin, LlamaModel):
    config: SlimLlamaConfig
    layer_class = LlamaDecoderLayer


class SlimLlamaForCausalLM(SlimForCausalLMMixin, LlamaForCausalLM):
    config: SlimLlamaConfig
    model_class = SlimLlamaModel
"""


def test_checkpoint_with_two_files_of_code_loads_with_and_without_the_suite(samples, tmp_path):
    dense = make_tiny("gqa")
    masks = [LayerMask.from_groups(shape, [1], list(range(0, 40, 2 + i))) for i, shape in enumerate(shapes_of(dense))]
    pruned = shrink(dense, FAMILIES["llama"], masks)
    folder = tmp_path / "two-files"
    pruned.save_pretrained(folder)
    (folder / "modeling_slim_llama.py").write_text(EARLIER_FILE, encoding="utf-8")
    (folder / "slim_base.py").write_text(BASE.read_text(encoding="utf-8"), encoding="utf-8")
    with torch.no_grad():
        expected = pruned(samples).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(samples).logits, expected)
    save_file({"samples": samples, "logits": expected}, tmp_path / "expected.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert hasattr(sys.modules[type(model).__module__], "LlamaDecoderLayer")
with torch.no_grad():
    assert torch.equal(model(expected["samples"]).logits, expected["logits"])
"""
    process = run_python("-c", code, str(folder), str(tmp_path / "expected.safetensors"), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
