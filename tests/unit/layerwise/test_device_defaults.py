"""Precision of the solver and tokens per forward by the device, without one."""

import pytest
import torch

from slim_utils.families import LayerShape
from slim_utils.layerwise import device_defaults
from slim_utils.layerwise.device_defaults import default_tokens_per_forward, resolve_solve_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = [LayerShape(32, 32, 128, 11008)] * 2
GIB = 2**30


@pytest.mark.parametrize(("slowdown", "dtype"), [(1, "float64"), (2, "float64"), (32, "float32"), (64, "float32")])
def test_resolve_solve_dtype_auto_takes_fp64_where_it_is_fast(slowdown, dtype, monkeypatch):
    device_defaults.fp64_rate.cache_clear()
    seconds = {torch.float32: 1e-3, torch.float64: 1e-3 * slowdown}
    monkeypatch.setattr(device_defaults, "_product_seconds", lambda device, dtype: seconds[dtype])
    assert resolve_solve_dtype("auto", GPU) == getattr(torch, dtype)
    device_defaults.fp64_rate.cache_clear()


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_resolve_solve_dtype_named_is_not_probed(name, monkeypatch):
    monkeypatch.setattr(device_defaults, "fp64_rate", lambda device: pytest.fail("probed"))
    assert resolve_solve_dtype(name, GPU) == getattr(torch, name)
    assert resolve_solve_dtype("auto", CPU) == torch.float64


@pytest.mark.parametrize(
    ("free", "reserved", "tokens"), [(80, 0, 65536), (24, 0, 32768), (24, 18, 8192), (1, 0, 4096), (8, 9, 4096)]
)
def test_default_tokens_per_forward_grows_with_free_memory(free, reserved, tokens, monkeypatch):
    monkeypatch.setattr(device_defaults, "free_memory", lambda device: free * GIB)
    assert default_tokens_per_forward(GPU, SHAPES, 4096, torch.bfloat16, reserved * GIB) == tokens
    assert default_tokens_per_forward(CPU, SHAPES, 4096, torch.bfloat16, reserved * GIB) == 4096
