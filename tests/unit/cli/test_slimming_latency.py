"""Latency of the models of a finished run."""

from types import SimpleNamespace

import pytest
import torch

from slim_utils.cli import slimming_latency
from slim_utils.families import find_family
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.profiling.latency_table import TimedRequest
from slim_utils.pruning_config import PruningConfig
from tests.tiny_models import make_tiny


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), torch.AcceleratorError("CUDA error: out of memory", 2)]
)
def test_measured_latency_where_memory_is_full_is_left_out(error, monkeypatch, caplog, tmp_path):
    def full(*args):
        raise error

    model = make_tiny("gqa")
    monkeypatch.setattr(slimming_latency, "load_model", lambda *args, **options: model)
    monkeypatch.setattr(slimming_latency, "measure_latency", full)
    config = PruningConfig(device="cpu", save_dir=str(tmp_path))
    host, table = ResidentModel(model, find_family(model.config)), SimpleNamespace(request=TimedRequest())
    assert slimming_latency.measured_latency(config, host, table) is None
    assert "latency of the pruned model not measured: out of device memory" in caplog.text
