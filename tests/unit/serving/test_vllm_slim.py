"""The parts of the vLLM plugin that need no vLLM: configurations, sizes, division among devices."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers import AutoConfig

from slim_utils.families import FAMILIES, PLUGIN_FAMILIES, find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink
from tests.tiny_models import make_tiny
from vllm_slim.configs import MODEL_TYPES, config_class
from vllm_slim.sizes import LayerSizes, check_tensor_parallel, layer_sizes

PLUGIN = Path(__file__).resolve().parents[3] / "serving" / "vllm_slim"
# Loads the configuration of a checkpoint with the plugin alone.
LOAD = """
import pickle, sys
from transformers import AutoConfig
from vllm_slim.configs import register_configs
from vllm_slim.sizes import layer_sizes
register_configs()
register_configs()
config = AutoConfig.from_pretrained(sys.argv[1])
assert "models" not in sys.modules and "transformers_modules" not in sys.modules
assert type(config).__module__ == "vllm_slim.configs"
pickle.dump(config, open(sys.argv[2], "wb"))
print([(s.heads, s.kv_heads, s.columns) for s in layer_sizes(config)])
"""
# Gets it from another process, before the plugin is called.
UNPICKLE = """
import pickle, sys
from vllm_slim.sizes import layer_sizes
config = pickle.load(open(sys.argv[1], "rb"))
print([(s.heads, s.kv_heads, s.columns) for s in layer_sizes(config)])
"""


def pruned(name):
    """A tiny pruned model with per-layer shapes."""
    model = make_tiny(name, num_key_value_heads=2)
    masks = []
    for index, shape in enumerate(layer_shapes(model.config)):
        columns = [c for c in range(shape.num_columns) if c % shape.ffn_width >= 8 * (index % 2)]
        heads = [head for head in range(shape.num_heads) if head % shape.heads_per_group or index != 1]
        masks.append(LayerMask.from_heads(shape, heads, columns))
    return shrink(model, find_family(model.config), masks)


@pytest.mark.parametrize("model_type", PLUGIN_FAMILIES)
def test_layer_sizes_are_those_of_the_suite(model_type):
    config = pruned("gqa" if model_type == "llama" else model_type).config
    expected = [LayerSizes(shape.num_heads, shape.num_kv_heads, shape.ffn_width) for shape in layer_shapes(config)]
    assert layer_sizes(config) == expected and len(set(expected)) > 1


def test_layer_sizes_with_whole_experts_leave_out_their_columns():
    config = pruned("qwen3_moe").config
    columns = [sizes.columns for sizes in layer_sizes(config, experts_whole=True)]
    # Layer 1 has no experts.
    assert columns == [0, layer_shapes(config)[1].ffn_width, 0, 0]


def test_layer_sizes_of_an_empty_layer_are_refused():
    config = AutoConfig.for_model("llama", num_hidden_layers=2, intermediate_size=0)
    with pytest.raises(ValueError, match="layer 0 has 32 heads, 32 key/value heads and 0 FFN columns"):
        layer_sizes(config)


def test_config_loads_by_the_plugin_alone(tmp_path):
    model = pruned("gqa")
    model.save_pretrained(tmp_path)
    shapes = [(shape.num_heads, shape.num_kv_heads, shape.ffn_width) for shape in layer_shapes(model.config)]
    for argv in ([LOAD, tmp_path, tmp_path / "pickled"], [UNPICKLE, tmp_path / "pickled"]):
        process = subprocess.run([sys.executable, "-c", *argv], cwd=PLUGIN, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        assert "Reading global config" not in process.stderr
        assert process.stdout.strip() == str(shapes)


def test_architectures_of_the_plugin_are_those_of_checkpoints():
    by_family = {FAMILIES[model_type].base_type: name for name, (model_type, _) in MODEL_TYPES.items()}
    assert set(by_family) == set(PLUGIN_FAMILIES)
    for family, architecture in by_family.items():
        shipped, model = FAMILIES[family].slim_config, FAMILIES[family].slim_model
        cls = config_class(architecture)
        assert (architecture, cls.model_type) == (model.__name__, shipped.model_type)
        # The mixins differ, the library's class does not.
        assert cls.__mro__[2] is shipped.__mro__[2]


@pytest.mark.parametrize(
    ("devices", "what"),
    [(1, ""), (2, ""), (4, "6 heads"), (3, "2 key/value heads"), (6, "100 FFN columns")],
)
def test_indivisible_names_the_first_size_that_does_not_divide(devices, what):
    # 6 devices share each of 2 key/value heads; 3 cannot.
    assert LayerSizes(6, 2, 100).indivisible(devices) == what


def test_check_tensor_parallel_names_the_layer_and_the_largest_size_that_divides():
    sizes = [LayerSizes(8, 4, 96), LayerSizes(4, 2, 96), LayerSizes(6, 2, 96)]
    check_tensor_parallel(sizes, 2, dense_heads=8)
    with pytest.raises(ValueError) as error:
        check_tensor_parallel(sizes, 4, dense_heads=8)
    assert str(error.value) == (
        "--tensor-parallel-size 4 does not divide the 6 heads of layer 2; "
        "use --tensor-parallel-size 2, or prune with --tp_size 4"
    )


def test_check_tensor_parallel_advises_a_size_that_divides_the_dense_heads_too():
    with pytest.raises(ValueError, match="use --tensor-parallel-size 1,"):
        check_tensor_parallel([LayerSizes(6, 6, 96)], 4, dense_heads=9 * 5 + 2)


def test_pyproject_of_the_plugin_registers_it():
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"slim": "vllm_slim:register"}
