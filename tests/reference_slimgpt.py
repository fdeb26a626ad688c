"""A plain SlimGPT to test against: refactorises the Hessian at every step and walks the columns one by one."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slim_utils.families import find_family, layer_shapes


def hessian_of(inputs: Tensor) -> Tensor:
    """``(2/n) Σ x xᵀ`` over (samples, tokens, in) inputs, n counting samples, in their dtype."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return 2 / inputs.shape[0] * flat.T @ flat


def struct_prune(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    unit: int = 1,
    percdamp: float = 0.0,
    compensate: bool = True,
    groups: int = 1,
) -> tuple[Tensor, list[int]]:
    """The pruned weight and the removed units, sorted; of several groups of units each loses as many."""
    weight, hessian = weight.clone(), hessian.clone()
    columns = weight.shape[1]
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += percdamp * torch.diag(hessian).mean() * torch.eye(columns, dtype=hessian.dtype)
    per_group = columns // unit // groups
    target = groups * round(per_group * sparsity)
    removed: list[int] = []
    size = (target - 512) // 2
    while len(removed) < target:
        inverse = torch.linalg.inv(hessian)
        lost = [sum(u // per_group == group for u in removed) for group in range(groups)]
        left = [u for u in range(columns // unit) if u not in removed and lost[u // per_group] == min(lost)]
        scores = {u: _score(weight, inverse, u, unit) for u in left}
        best = sorted(left, key=scores.__getitem__)
        count = 1 if unit > 1 else min(target - len(removed), max(size, 64), 1024)
        taken = best[:count]
        picked = [u * unit + i for u in taken for i in range(unit)]
        if compensate:
            for column in picked:
                # One column at a time, each with the inverse Hessian of the columns that are left.
                weight -= torch.outer(weight[:, column], inverse[column]) / inverse[column, column]
                inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
                # What is gone stays out of the later updates.
                inverse[column, :] = inverse[:, column] = 0
        weight[:, picked] = 0
        hessian[picked, :] = hessian[:, picked] = 0
        hessian[picked, picked] = 1
        removed += taken
        size = (size - 512) // 2
    return weight, sorted(removed)


def _score(weight: Tensor, inverse: Tensor, index: int, unit: int) -> float:
    span = slice(index * unit, (index + 1) * unit)
    pivots = torch.linalg.cholesky(inverse[span, span]).diagonal() ** 2
    return (weight[:, span] ** 2 / pivots).sum().item()


def prune_experts(model: nn.Module, samples: Tensor, experts: nn.Module, sparsity: float, percdamp: float) -> list[int]:
    """Prune every expert on what the router sends it, a token at a time; removed columns counted through them all."""
    seen = []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(samples)
    handle.remove()
    removed = []
    for index, (gate_up, down) in enumerate(zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True)):
        inputs = []
        for hidden, chosen, weights in seen:
            for token, place in (chosen == index).nonzero().tolist():
                gate, up = (gate_up @ hidden[token]).chunk(2)
                inputs.append(nn.functional.silu(gate) * up * weights[token, place])
        columns = down.shape[1]
        damping = max(percdamp, 1.0) if len(inputs) < columns else percdamp
        hessian = hessian_of(torch.stack(inputs)[None]) if inputs else torch.eye(columns, dtype=down.dtype)
        pruned, gone = struct_prune(down, hessian, sparsity, percdamp=damping)
        down.copy_(pruned)
        removed += [index * columns + column for column in gone]
    return removed


def prune_model(
    model: nn.Module, samples: Tensor, ratios: list[float], percdamp: float, query_heads: bool = False
) -> list[tuple[list, list]]:
    """Prune a model in place, each Hessian from a forward of the whole model; the removed units a layer."""
    removed = []
    family, shapes = find_family(model.config), layer_shapes(model.config)
    for layer, shape, ratio in zip(family.decoder_layers(model), shapes, ratios, strict=True):
        group = shape.head_dim * shape.heads_per_group
        units_of = (((shape.head_dim, shape.num_kv_heads) if query_heads else (group, 1)), (1, 1))
        units = []
        for name, (unit, groups) in zip((family.attention_out, family.mlp_out), units_of, strict=True):
            if name == "mlp.down_proj" and hasattr(layer.mlp, "experts"):
                units.append(prune_experts(model, samples, layer.mlp.experts, ratio, percdamp))
                continue
            linear = layer.get_submodule(name)
            seen = []
            handle = linear.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(samples)
            handle.remove()
            transposed = isinstance(linear, Conv1D)
            weight = linear.weight.data.T if transposed else linear.weight.data
            pruned, gone = struct_prune(weight, hessian_of(torch.cat(seen)), ratio, unit, percdamp, True, groups)
            linear.weight.data = pruned.T if transposed else pruned
            units.append(gone)
        removed.append(tuple(units))
    return removed
