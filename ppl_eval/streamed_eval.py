"""Perplexity of a model that is larger than memory: every layer is brought once, and runs all windows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm

from slim_utils.layer_host import CPU, LayerHost
from slim_utils.layer_replay import LayerReplay, capture_layer_calls, layer_outputs_given
from slim_utils.walk_settings import WalkSettings


@contextmanager
@torch.no_grad()
def layers_run_once(host: LayerHost, device: torch.device, windows: Tensor, batch_size: int) -> Iterator[None]:
    """While a forward of the model takes the next ``batch_size`` of ``windows`` and finds its layers' outputs ready.

    Args:
        host: brings the layers.
        device: where they are run.
        windows: (count, seq_len) token ids; the activations of all are kept on the CPU.
        batch_size: windows of each forward to come, in their order.
    """
    settings = WalkSettings(device, cache_dev=CPU)
    with host.outside():
        hidden, calls = capture_layer_calls(host.model, host.layers, windows, settings)
    for index in tqdm(range(len(host.layers)), desc="layers", unit="layer", disable=None, leave=False):
        layer = host.fetch(index, device)
        LayerReplay(layer, host.family, hidden, send_to_device(calls[index], device), settings).advance()
        host.release(index)
    outputs = (batch.to(device) for batch in hidden.split(batch_size))
    with host.outside(device), layer_outputs_given(host.layers, outputs):
        yield
