"""Devices of a pruning run, by its flags and the GPUs of the machine."""

import pytest
import torch

from slim_utils.cli.slimming_checks import with_devices
from slim_utils.common.errors import UserError
from slim_utils.pruning_config import PruningConfig


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def second_of_two_processes(two_gpus, monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def devices(device, cache_dev):
    config = with_devices(PruningConfig(device=device, cache_dev=cache_dev))
    return config.torch_device, config.torch_cache_dev


@pytest.mark.parametrize(
    ("device", "cache_dev"), [("cuda:1", "cuda"), ("cuda:1", None), ("auto", "cuda:0"), ("cuda:0", "cuda")]
)
def test_with_devices_of_one_gpu_by_two_names_are_equal(two_gpus, device, cache_dev):
    """Activations on another GPU than the layers, or inputs computed twice, were the price of another spelling."""
    compute, cache = devices(device, cache_dev)
    assert compute == cache
    assert str(compute) == ("cuda" if device == "auto" else device)


def test_with_devices_keeps_activations_on_another_device(two_gpus):
    assert devices("cuda:0", "cuda:1") == (torch.device("cuda:0"), torch.device("cuda:1"))
    assert devices("cuda:1", "cpu") == (torch.device("cuda:1"), torch.device("cpu"))


@pytest.mark.parametrize("cache_dev", [None, "cuda"])
def test_with_devices_of_a_rank_are_its_gpu(second_of_two_processes, cache_dev):
    assert devices("auto", cache_dev) == (torch.device("cuda:1"), torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("flags", "refused"), [(("cuda:0", None), "--device cuda:0"), (("auto", "cuda:0"), "--cache_dev cuda:0")]
)
def test_with_devices_shared_by_processes_are_refused(second_of_two_processes, flags, refused):
    with pytest.raises(UserError, match=f"{refused}: 2 processes need a GPU each"):
        devices(*flags)
