"""``scripts/prune_adapter.py``: pruned base and carried adapter against masked base and adapter."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scripts import prune_adapter
from slim_utils.common.errors import UserError
from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import PRUNING_FILE, LayerMask, ModelUnits, write_units
from slim_utils.params_remove import shrink, zero_removed
from tests.processes import run_python
from tests.tiny_models import make_tiny
from tests.unit.test_masks import uneven_masks
from train_utils.lora import _family_targets
from train_utils.sparse_trainer import masked_slices

# Grouped heads, fused maps, norms over all heads, biases and LayerNorm, weights stored transposed.
VARIANTS = [("gqa", "query_head"), ("gqa", "kv_group"), ("phi3", "query_head"), ("olmo2", "query_head")]
VARIANTS += [("opt", "kv_group"), ("gpt2", "kv_group")]


def main(*arguments: object) -> None:
    prune_adapter.main(prune_adapter.build_parser().parse_args(list(map(str, arguments))))


def targets_of(model, out: bool) -> list[str]:
    """Names of the maps of a family's decoder layers; without ``out``, those that feed attention and FFN outputs."""
    family = find_family(model.config)
    names = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    targets = _family_targets(family, names)
    outputs = {family.attention_out.rpartition(".")[2], family.mlp_out.rpartition(".")[2]}
    return targets if out else [name for name in targets if name not in outputs]


def adapted(model, targets: list[str], bias: str = "none") -> PeftModel:
    """``model`` with random adapters."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, bias=bias)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.normal_()
    return model.eval()


def write_pruned(folder, dense, masks) -> None:
    family = find_family(dense.config)
    shrink(dense, family, masks).save_pretrained(folder)
    units = ModelUnits.unpruned("dense", dense.config.model_type, True, layer_shapes(dense.config)).pruned(masks)
    write_units(folder / PRUNING_FILE, units)


def masked_beside_pruned(folder, dense, unit: str) -> tuple[PreTrainedModel, list[LayerMask]]:
    """The masked model of uneven masks, and the masks; their pruned model is written to ``folder``."""
    masks = uneven_masks(layer_shapes(dense.config), unit, dense_layer=1)
    write_pruned(folder, dense, masks)
    masked = copy.deepcopy(dense)
    zero_removed(masked, find_family(dense.config), masks)
    return masked, masks


def load_adapted(base, adapter) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


@torch.no_grad()
def logits_of(model, samples) -> torch.Tensor:
    return model(input_ids=samples).logits


@pytest.mark.parametrize(("variant", "unit"), VARIANTS)
def test_carried_adapter_has_the_logits_of_the_masked_model(variant, unit, samples, tmp_path):
    dense = make_tiny(variant)
    family = find_family(dense.config)
    masked, masks = masked_beside_pruned(tmp_path / "pruned", dense, unit)
    for out in (False, True):
        adapter, carried = tmp_path / f"adapter_{out}", tmp_path / f"carried_{out}"
        model = adapted(copy.deepcopy(masked), targets_of(dense, out))
        model.save_pretrained(adapter)
        main(adapter, tmp_path / "pruned", carried)
        if out or family.head_norms:
            # The adapter of an output map, and a norm over all heads, act on the outputs of removed units, too.
            with torch.no_grad():
                for part in masked_slices(model, family, masks):
                    part.parameter.copy_(part.zero(part.parameter))
        pruned = load_adapted(tmp_path / "pruned", carried)
        expected = logits_of(model, samples)
        assert torch.allclose(logits_of(pruned, samples), expected, atol=1e-5)
        assert not torch.allclose(logits_of(pruned.get_base_model().eval(), samples), logits_of(masked, samples)) or out


def test_trained_biases_are_carried_over(samples, tmp_path):
    dense = make_tiny("opt")
    masked, _ = masked_beside_pruned(tmp_path / "pruned", dense, "kv_group")
    model = adapted(masked, targets_of(dense, False), bias="lora_only")
    model.save_pretrained(tmp_path / "adapter")
    main(tmp_path / "adapter", tmp_path / "pruned", tmp_path / "carried")
    pruned = load_adapted(tmp_path / "pruned", tmp_path / "carried")
    assert torch.allclose(logits_of(pruned, samples), logits_of(model, samples), atol=1e-5)


def test_bias_of_a_factor_and_whole_weights_are_carried_over(samples, tmp_path):
    masked, _ = masked_beside_pruned(tmp_path / "pruned", make_tiny("gqa"), "query_head")
    config = LoraConfig(r=2, target_modules=["gate_proj"], lora_bias=True, init_lora_weights=False)
    config.modules_to_save = ["down_proj"]
    model = get_peft_model(masked, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    main(tmp_path / "adapter", tmp_path / "pruned", tmp_path / "carried")
    pruned = load_adapted(tmp_path / "pruned", tmp_path / "carried")
    assert torch.allclose(logits_of(pruned, samples), logits_of(model, samples), atol=1e-5)


@pytest.fixture
def folders(tmp_path):
    """Adapter of a dense model, and its pruned model."""
    dense = make_tiny("gqa")
    write_pruned(tmp_path / "pruned", dense, uneven_masks(layer_shapes(dense.config), "query_head", dense_layer=1))
    adapted(dense, ["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", tmp_path / "pruned", tmp_path / "carried"


def test_prune_adapter_as_a_user_runs_it(folders):
    adapter, pruned, carried = folders
    process = run_python("scripts/prune_adapter.py", adapter, pruned / PRUNING_FILE, carried)
    assert process.returncode == 0, process.stderr
    assert "weights of the adapter" in process.stderr
    config = json.loads((carried / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pruned) and config["r"] == 2
    assert sorted(path.name for path in carried.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = run_python("scripts/prune_adapter.py", adapter, pruned, carried)
    assert again.returncode == 2 and "--overwrite" in again.stderr.splitlines()[-1]


def test_prune_adapter_of_wrong_inputs_is_refused(folders, tmp_path):
    adapter, pruned, carried = folders
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def refused(message: str, *arguments: object) -> None:
        with pytest.raises(UserError, match=message):
            main(*arguments)
        assert not carried.exists()

    refused("ADAPTER .*none: no readable adapter_config.json", tmp_path / "none", pruned, carried)
    refused("none: no such file", adapter, tmp_path / "none", carried)
    for changes, message in (
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"use_dora": True}, "use_dora is True: DoRA's magnitudes"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the weights of the base"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
        refused(f"ADAPTER: {message}", adapter, pruned, carried)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    adapted(make_tiny("gqa", intermediate_size=48), ["down_proj"]).save_pretrained(tmp_path / "other")
    refused("has 48 in dimension 1, the dense model 40; give an adapter of dense", tmp_path / "other", pruned, carried)
    weights = load_file(tmp_path / "other" / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.language_model.layers"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "other" / "adapter_model.safetensors")
    refused(
        "language_model.layers.0.* is not in model.layers; give an adapter of dense",
        tmp_path / "other",
        pruned,
        carried,
    )
    masked = tmp_path / "masked"
    make_tiny("gqa").save_pretrained(masked)
    (masked / PRUNING_FILE).write_bytes((pruned / PRUNING_FILE).read_bytes())
    refused("masked: is the masked model; give its pruned_weights", adapter, masked, carried)
    content = json.loads((pruned / PRUNING_FILE).read_text()) | {"dense": False}
    (pruned / PRUNING_FILE).write_text(json.dumps(content))
    refused("has no indices into the dense model, but into dense", adapter, pruned, carried)
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    (pruned / PRUNING_FILE).write_text(json.dumps(content | {"dense": True}))
    refused("no readable adapter_model.safetensors", adapter, pruned, carried)
