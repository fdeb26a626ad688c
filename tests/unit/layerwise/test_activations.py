"""Runs that go on with the activations that an earlier process kept."""

import logging

import pytest
import torch

from slim_utils.allocation.planner import plans_of
from slim_utils.common.errors import UserError
from slim_utils.families import find_family
from slim_utils.layerwise import activations
from slim_utils.layerwise.activations import ActivationStore
from slim_utils.layerwise.layer_forward import LayerForward
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import LayerStore
from slim_utils.layerwise.settings import PruningSettings
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")
SETTINGS = PruningSettings(CPU, CPU)
RATIOS = [0.2, 0.35, 0.5, 0.6]


def prune(variant, samples, store=None, starts=None, ratios=RATIOS, killed_at=None):
    """The pruned model and its masks; ``killed_at`` ends the run before that layer is pruned."""
    model = make_tiny(variant)
    family = find_family(model.config)

    def hook(index, *args):
        if index == killed_at:
            raise KeyboardInterrupt

    plans = plans_of(model, ratios, SETTINGS)
    return model, prune_layers(model, family, samples, plans, SETTINGS, store, starts=starts, hook=hook)[0]


@pytest.fixture
def cut_off(samples, tmp_path, monkeypatch):
    """Starts a run that is killed before a layer, and opens its store again; activations are kept after every layer."""
    monkeypatch.setattr(activations, "TIME_SHARE", 1e9)

    def run(variant, killed_at, limit=None, **options):
        first = LayerStore(tmp_path / "out", limit)
        first.open({}, False)
        with pytest.raises(KeyboardInterrupt):
            prune(variant, samples, first, killed_at=killed_at, **options)
        again = LayerStore(tmp_path / "out", limit)
        again.open({}, True)
        return again

    return run


@pytest.mark.parametrize("killed_at", [1, 2, 3])
@pytest.mark.parametrize("variant", ["gqa", "olmo2", "mixtral"])
@pytest.mark.parametrize("starts", [False, True])
def test_resumed_run_goes_on_to_the_same_bits_without_running_finished_layers(
    variant, killed_at, starts, samples, cut_off, monkeypatch, caplog
):
    starts = samples[:, :8].clone() if starts else None
    whole, expected = prune(variant, samples, starts=starts)
    store = cut_off(variant, killed_at, starts=starts)
    layers, advance = [], LayerForward.advance
    monkeypatch.setattr(LayerForward, "advance", lambda self: layers.append(self.layer) or advance(self))
    with caplog.at_level(logging.INFO):
        resumed, masks = prune(variant, samples, store, starts=starts)
    assert f"--resume: going on after layer {killed_at - 1}" in caplog.text
    assert masks == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    # The layer before the last is the last that is run to its end.
    assert len({id(layer) for layer in layers}) == 3 - killed_at


def test_resumed_run_with_shared_keys_and_values_runs_finished_layers_again(samples, cut_off, caplog):
    name = "gemma4_text of inputs by layer"
    whole, expected = prune(name, samples)
    store = cut_off(name, 3)
    assert store.kept_activations([0, 1, 2, 3], CPU) is None
    with caplog.at_level(logging.INFO):
        resumed, masks = prune(name, samples, store)
    assert "--resume: going on after" not in caplog.text
    assert masks == expected
    assert all(torch.equal(resumed.state_dict()[key], tensor) for key, tensor in whole.state_dict().items())


def test_unpruned_first_layers_are_not_run_again_either(samples, cut_off):
    ratios = [0.0, 0.3, 0.0, 0.5]
    whole, expected = prune("gqa", samples, ratios=ratios)
    resumed, masks = prune("gqa", samples, cut_off("gqa", 3, ratios=ratios), ratios=ratios)
    assert masks == expected
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_kept_activations_behind_a_missing_layer_are_not_used(samples, cut_off):
    store = cut_off("gqa", 3)
    assert store.kept_activations([0, 1, 2, 3], CPU)[0] == 2
    (store.folder / "layer_0001.safetensors").unlink()
    assert store.kept_activations([0, 1, 2, 3], CPU) is None
    whole, expected = prune("gqa", samples)
    resumed, masks = prune("gqa", samples, store)
    assert masks == expected
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_no_activations_are_kept_where_none_are_wanted(cut_off):
    store = cut_off("gqa", 3, limit=0)
    assert {path.name for path in store.folder.iterdir()} == {
        "settings.json",
        *(f"layer_000{index}.safetensors" for index in range(3)),
    }
    assert store.kept_activations([0, 1, 2, 3], CPU) is None


def test_activation_store_room_and_time_bound_what_is_written(tmp_path, monkeypatch):
    hidden = [torch.zeros(4, 8, 16)]
    ActivationStore(tmp_path / "a", 4 * 8 * 16 * 4 / activations.GIB).save(0, hidden)
    assert ActivationStore(tmp_path / "a").load(CPU)[0] == 0
    ActivationStore(tmp_path / "b", 0.5 * 4 * 8 * 16 * 4 / activations.GIB).save(0, hidden)
    monkeypatch.setattr(activations, "FREE_DISK_SHARE", 0)
    ActivationStore(tmp_path / "b").save(0, hidden)
    assert not (tmp_path / "b").exists()
    store = ActivationStore(tmp_path / "a", 1)
    store.save(1, hidden)
    # As if writing had taken so long that the rest of the run has been short beside it.
    store._write_seconds = 1e6
    store.save(2, hidden)
    assert store.load(CPU)[0] == 1


def test_activation_store_full_disk_ends_the_keeping_alone(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    store = ActivationStore(tmp_path / "a", 1)
    monkeypatch.setattr(activations, "save_tensors_atomic", full)
    for index in range(3):
        store.save(index, [torch.zeros(2)])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "activations for --resume are not kept" in caplog.text and "No space left" in caplog.text


@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: content[:-1] + b"\x7f"])
def test_damaged_layer_is_named(samples, cut_off, damage):
    store = cut_off("gqa", 2)
    path = store.folder / "layer_0001.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"--resume: .*layer_0001.safetensors is damaged; remove it and the later layers"
    ):
        prune("gqa", samples, store)
    path.unlink()
    assert prune("gqa", samples, store)[1] == prune("gqa", samples)[1]


def test_nothing_is_run_where_every_layer_is_finished(samples, tmp_path, monkeypatch):
    first = LayerStore(tmp_path / "out", 0)
    first.open({}, False)
    expected = prune("gqa", samples, first)[1]
    again = LayerStore(tmp_path / "out", 0)
    again.open({}, True)
    monkeypatch.setattr(LayerForward, "advance", lambda self: pytest.fail("run"))
    assert prune("gqa", samples, again)[1] == expected


def test_damaged_activations_are_told_and_done_without(samples, cut_off, caplog):
    store = cut_off("gqa", 2)
    store.activations.path.write_bytes(b"\0" * 5)
    _, masks = prune("gqa", samples, store)
    assert "finished layers are run again" in caplog.text
    assert masks == prune("gqa", samples)[1]
