"""The walk on a CUDA device against the CPU."""

import pytest
import torch

from slim_utils.families import find_family
from slim_utils.layer_walk import WalkSettings, prune_layers
from tests.conftest import make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("cache_dev", ["cuda", "cpu"])
def test_same_units_and_weights_as_on_the_cpu(samples, cache_dev):
    on_cpu, on_gpu = make_llama("gqa"), make_llama("gqa")
    ratios = [0.3, 0.5, 0.6, 0.7]
    devices = {on_cpu: ("cpu", "cpu"), on_gpu: ("cuda", cache_dev)}
    masks = []
    for model, (device, cache) in devices.items():
        settings = WalkSettings(torch.device(device), torch.device(cache), batch_samples=3)
        masks.append(prune_layers(model, find_family(model.config), samples, ratios, settings)[0])
    assert masks[0] == masks[1]
    assert on_gpu.device.type == "cpu"
    for name, expected in on_cpu.state_dict().items():
        assert torch.allclose(on_gpu.state_dict()[name], expected, rtol=1e-3, atol=1e-3), name
