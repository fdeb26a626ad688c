"""Perplexity of a model that does not fit in memory: every layer is onloaded once and runs all windows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_eval.ppl_dataset import EvalSets
from ppl_eval.ppl_eval import evaluate
from slim_utils.common.memory import empty_cache, free_memory, full_gpu_as_out_of_memory
from slim_utils.layerwise.layer_forward import LayerForward, capture_layer_kwargs, layer_outputs_given
from slim_utils.layerwise.less_memory import retry_with_less_memory
from slim_utils.layerwise.offload import CPU, ResidentModel
from slim_utils.layerwise.settings import PruningSettings

logger = logging.getLogger(__name__)


def evaluate_on(host: ResidentModel, device: torch.device, eval_sets: EvalSets) -> list[dict[str, Any]]:
    """Perplexities of a model in host memory: on ``device`` as a whole if it fits, else layer by layer."""
    needed = sum(tensor.nbytes for tensor in (*host.model.parameters(), *host.model.buffers()))
    if device.type == "cpu" or needed < free_memory(device):
        with suppress(torch.OutOfMemoryError), full_gpu_as_out_of_memory():
            return evaluate(host.model.to(device), eval_sets)
    # Outside the handler, whose traceback keeps tensors alive.
    host.model.to(CPU)
    empty_cache(device)
    logger.warning("evaluation: the model does not fit in device memory; evaluating layer by layer")
    return evaluate_layers(host, device, eval_sets)


def evaluate_layers(host: ResidentModel, device: torch.device, eval_sets: EvalSets) -> list[dict[str, Any]]:
    """Perplexities of a model whose layers are onloaded to ``device`` one at a time."""
    return evaluate(host.model, eval_sets, partial(precomputed_layer_outputs, host, device))


@contextmanager
@torch.no_grad()
def precomputed_layer_outputs(
    host: ResidentModel, device: torch.device, windows: Tensor, batch_size: int
) -> Iterator[None]:
    """Run all layers on ``windows``; forwards in the context reuse the outputs, ``batch_size`` windows each, in order.

    Args:
        host: model whose layers are onloaded and offloaded.
        device: device that the layers run on.
        windows: (count, seq_len) token ids; the activations of all windows are kept on the CPU.
        batch_size: windows per forward in the context.
    """

    def layer_outputs(settings: PruningSettings) -> Tensor:
        with host.non_layer_modules():
            hidden, calls = capture_layer_kwargs(host.model, host.layers, windows, settings)
        for index in tqdm(range(len(host.layers)), desc="layers", unit="layer", disable=None, leave=False):
            layer = host.onload(index, device)
            LayerForward(layer, host.family, hidden, calls[index], settings).advance()
            host.offload(index)
        return hidden

    settings = PruningSettings(device, cache_dev=CPU)
    hidden = retry_with_less_memory(layer_outputs, settings, windows, host, "evaluation")
    outputs = (batch.to(device) for batch in hidden.split(batch_size))
    with host.non_layer_modules(device), layer_outputs_given(host.family, host.layers, outputs):
        yield
