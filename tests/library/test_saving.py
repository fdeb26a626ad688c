"""Checkpoints, configurations and copies of pruned models."""

import copy
import json
import pickle
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from slim_utils.families import FAMILIES, layer_shapes
from tests.library.subjects import Subject, body_of, difference, every_row, logits, tokens


def attentions(subject: Subject, model: PreTrainedModel) -> list[nn.Module]:
    """Attention modules; in hybrids, of the layers that have one."""
    family = FAMILIES[subject.name]
    layers = zip(family.decoder_layers(model), layer_shapes(model.config), strict=True)
    return [layer.get_submodule(family.attention_block) for layer, shape in layers if shape.num_heads]


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Both models have the same shapes, weights and logits."""
    assert layer_shapes(model.config) == layer_shapes(other.config)
    state, other_state = model.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())
    # The products of experts depend on the alignment of their memory.
    assert difference(logits(model), logits(other)) < 1e-5


@every_row
def test_layers_differ_in_every_size(subject: Subject, tmp_path: Path) -> None:
    shapes = layer_shapes(subject.load().config)
    for size in ("num_heads", "num_kv_heads", "num_columns"):
        # The single kv head of multi-query attention stays.
        multi_query = size == "num_kv_heads" and layer_shapes(subject.dense().load().config)[0].num_kv_heads == 1
        assert len({getattr(shape, size) for shape in shapes}) > 1 or multi_query, size


@every_row
def test_save_and_load_keeps_weights_and_config(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    model.save_pretrained(tmp_path)
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(model, reloaded)
    ignored = {"_name_or_path", "transformers_version"}
    first, second = (
        {key: value for key, value in config.to_dict().items() if key not in ignored}
        for config in (model.config, reloaded.config)
    )
    assert first == second
    assert sorted(path.name for path in tmp_path.glob("*.py")) == sorted(
        path.name for path in subject.folder().glob("*.py")
    )


@every_row
def test_sharded_save_and_load_keeps_weights(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@every_row
def test_model_without_head_is_that_of_the_causal_model(subject: Subject, tmp_path: Path) -> None:
    model = subject.load(attn_implementation="eager")
    body, report = AutoModel.from_pretrained(subject.folder(), attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        expected = body_of(subject, model)(tokens()).last_hidden_state
        assert difference(expected, body(tokens()).last_hidden_state) < 1e-5
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body", attn_implementation="eager")
    with torch.no_grad():
        assert difference(expected, again(tokens()).last_hidden_state) < 1e-5
    # The head is new, or the tied embeddings.
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "body", attn_implementation="eager")
    with torch.no_grad():
        assert difference(expected, body_of(subject, causal)(tokens()).last_hidden_state) < 1e-5


@every_row
def test_config_survives_dicts_json_pickle_and_copies(subject: Subject, tmp_path: Path) -> None:
    config = subject.load().config
    model_class = type(config)
    shapes = layer_shapes(config)
    copies = {
        "from_dict": model_class.from_dict(config.to_dict()),
        "for_model": AutoConfig.for_model(**config.to_dict()),
        "json": model_class.from_dict(json.loads(config.to_json_string())),
        "diff": model_class.from_dict(config.to_diff_dict()),
        "pickle": pickle.loads(pickle.dumps(config)),
        "deepcopy": copy.deepcopy(config),
        "copy": copy.copy(config),
    }
    config.save_pretrained(tmp_path)
    copies["file"] = AutoConfig.from_pretrained(tmp_path)
    ignored = {"_name_or_path", "transformers_version"}
    expected = {key: value for key, value in config.to_dict().items() if key not in ignored}
    for way, other in copies.items():
        assert type(other) is model_class, way
        assert layer_shapes(other) == shapes, way
        assert {key: value for key, value in other.to_dict().items() if key not in ignored} == expected, way


@every_row
def test_deepcopy_of_a_model_is_independent(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    expected = logits(model)
    other = copy.deepcopy(model)
    assert_same(model, other)
    other.set_attn_implementation("eager")
    other.config.use_cache = not model.config.use_cache
    for changed, ours in ((other, "eager"), (model, model.config._attn_implementation)):
        for attention in attentions(subject, changed):
            # An attention that has no other implementation keeps no configuration.
            config = getattr(attention, "config", changed.config)
            assert config._attn_implementation == ours
            assert config.use_cache == changed.config.use_cache
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), expected)


@every_row
def test_pickled_model_is_the_same(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    torch.save(model, tmp_path / "model.pt")
    # A file of this test.
    assert_same(model, torch.load(tmp_path / "model.pt", weights_only=False))


@every_row
def test_device_maps_and_low_memory_load_the_same_model(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    for options in ({"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}):
        assert_same(model, subject.load(**options))


@every_row
def test_layers_on_disk_give_the_same_logits(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    memory = {"cpu": sum(sizes.values()) * 7 // 10, "disk": 10**9}
    device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    assert {"cpu", "disk"} == set(device_map.values())
    offloaded = subject.load(device_map=device_map, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(logits(offloaded), logits(model))


@every_row
def test_missing_weights_are_initialised_the_others_loaded(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    layers = FAMILIES[subject.name].layers
    absent = [name for name in state if name.startswith(f"{layers}.2.")]
    save_file(
        {name: tensor for name, tensor in state.items() if name not in absent},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    # Memory that nothing has written is NaN then.
    torch.use_deterministic_algorithms(True)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert absent and any(layers in name for name in report["missing_keys"])
    for name, parameter in loaded.named_parameters():
        if name.startswith(f"{layers}.2."):
            assert parameter.isfinite().all() and parameter.abs().max() < 10, name
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name
    assert logits(loaded).isfinite().all()


@every_row
def test_new_model_of_the_config_is_initialised_as_the_stock_class(subject: Subject, tmp_path: Path) -> None:
    """Every weight is drawn with the standard deviation of the same weight in a stock model; biases and norms equal."""
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(subject.load().config)
    stock = AutoModelForCausalLM.from_config(subject.dense().load().config)
    for name, parameter in ours.named_parameters():
        assert parameter.isfinite().all(), name
        expected = stock.get_parameter(name)
        if expected.std(correction=0) == 0:
            assert parameter.std(correction=0) == 0 and parameter.flatten()[0] == expected.flatten()[0], name
        elif parameter.numel() >= 96:
            assert 0.6 < parameter.std() / expected.std() < 1.6, name
