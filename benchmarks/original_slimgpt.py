"""Reimplementation of the original's procedure, as a baseline of pruning time.

As in the original: one sample per forward and three forwards per layer; fp32 Hessians; the Hessian of the remaining
columns is refactorised before every head and every group of columns; the columns of a group are compensated one by one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def prune_model(model: PreTrainedModel, samples: Tensor, ratios: list[float], percdamp: float) -> None:
    """Prune the first layers of a LLaMA, one per ratio, in place on its device.

    Args:
        model: LLaMA model; in grouped-query attention, whole kv groups are removed.
        samples: (num_samples, seqlen) token ids.
        ratios: pruning ratios of the first layers.
        percdamp: damping as a fraction of the mean diagonal of the Hessian.
    """
    hidden, call = first_inputs(model, samples)
    config = model.config
    group = config.head_dim * config.num_attention_heads // config.num_key_value_heads
    for layer, ratio in zip(model.model.layers, ratios, strict=False):
        for linear, unit_size in ((layer.self_attn.o_proj, group), (layer.mlp.down_proj, 1)):
            hessian = accumulate(layer, linear, hidden, call)
            weight = linear.weight.float()
            target = round(linear.in_features // unit_size * ratio)
            linear.weight.copy_(prune_columns(weight, hessian, target, unit_size, percdamp))
        for index in range(len(hidden)):
            hidden[index] = run(layer, hidden[index : index + 1], call)[0]


class _Stop(Exception):  # noqa: N818 - not an error
    """Raised at the first layer to end the forward."""


def first_inputs(model: PreTrainedModel, samples: Tensor) -> tuple[Tensor, dict]:
    """Hidden states that enter the first layer, and its keyword arguments."""
    calls: list[tuple[Tensor, dict]] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args[0], kwargs))
        raise _Stop

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for sample in samples:
        try:
            model.model(sample[None].to(model.device), use_cache=False)
        except _Stop:
            continue
    handle.remove()
    return torch.cat([hidden for hidden, _ in calls]), calls[0][1]


def run(layer: nn.Module, sample: Tensor, call: dict) -> Tensor:
    """Output of a layer on one sample."""
    output = layer(sample, **call)
    return output[0] if isinstance(output, tuple) else output


def accumulate(layer: nn.Module, linear: nn.Linear, hidden: Tensor, call: dict) -> Tensor:
    """Hessian ``(2/n) Σ x xᵀ`` of the inputs of ``linear`` in fp32, one sample at a time."""
    hessian = torch.zeros(linear.in_features, linear.in_features, device=hidden.device)
    num_samples = 0

    def add(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal num_samples
        inputs = args[0].flatten(0, 1).float().T
        hessian.mul_(num_samples / (num_samples + 1))
        num_samples += 1
        inputs = (2 / num_samples) ** 0.5 * inputs
        hessian.add_(inputs.matmul(inputs.T))

    handle = linear.register_forward_hook(add)
    for sample in hidden:
        run(layer, sample[None], call)
    handle.remove()
    return hessian


def prune_columns(weight: Tensor, hessian: Tensor, target: int, unit_size: int, percdamp: float) -> Tensor:
    """``weight`` (out, in) with ``target`` units of columns pruned; every step factorises the Hessian again."""
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(percdamp * hessian.diagonal().mean())
    left = torch.arange(weight.shape[1], device=weight.device)
    for count in step_sizes(target, unit_size):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[left][:, left]))
        current = weight[:, left]
        units = scores(current, inverse, unit_size).argsort()[:count]
        columns = (units[:, None] * unit_size + torch.arange(unit_size, device=units.device)).flatten()
        kept = torch.ones(len(left), dtype=torch.bool, device=left.device)
        kept[columns] = False
        order = torch.cat([columns, kept.nonzero().flatten()])
        factor = torch.linalg.cholesky(inverse[order][:, order], upper=True)
        removed = len(columns)
        current, errors = current[:, order], weight.new_zeros(len(weight), removed)
        for column in range(removed):
            errors[:, column] = current[:, column] / factor[column, column]
            current[:, column:removed] -= errors[:, column, None] * factor[column, column:removed]
        current[:, removed:] -= errors @ factor[:removed, removed:]
        current[:, :removed] = 0
        weight[:, left[order]] = current
        left = left[kept]
    return weight


def step_sizes(target: int, unit_size: int) -> Iterator[int]:
    """Units of each step: heads one by one, columns by the dynamic group size."""
    size = (target - 512) // 2
    while target:
        count = 1 if unit_size > 1 else min(target, max(min(size, 1024), 64))
        yield count
        target -= count
        size = (size - 512) // 2


def scores(weight: Tensor, inverse: Tensor, unit_size: int) -> Tensor:
    """``Σ W² / diag(chol(H⁻¹ block))²`` of every unit, a unit at a time."""
    energy = weight.square().sum(dim=0)
    if unit_size == 1:
        return energy / inverse.diagonal()
    units = []
    for start in range(0, len(inverse), unit_size):
        span = slice(start, start + unit_size)
        pivots = torch.linalg.cholesky(inverse[span, span]).diagonal().square()
        units.append((energy[span] / pivots).sum())
    return torch.stack(units)
