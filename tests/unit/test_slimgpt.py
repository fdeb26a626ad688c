"""The OBS maths against a plain re-implementation and against brute force."""

import itertools
import weakref

import pytest
import torch
from torch import nn

from slim_utils import obs
from slim_utils.common.errors import UserError
from slim_utils.obs import (
    SelectionOptions,
    damping_steps,
    diagonal_blocks,
    greedy_obs,
    group_sizes,
    invert_in_place,
    output_energy,
    unit_scores,
)
from slim_utils.slimgpt import SlimGPT
from tests.reference_slimgpt import hessian_of, struct_prune


def random_inputs(columns: int, tokens: int = 64, samples: int = 6, seed: int = 0) -> torch.Tensor:
    """Correlated (samples, tokens, columns) fp64 inputs of unlike scales, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-1, 1, columns, dtype=torch.float64)
    return torch.randn(samples, tokens, columns, generator=generator, dtype=torch.float64) @ mix * scale


def make_pruner(weight: torch.Tensor, inputs: torch.Tensor) -> SlimGPT:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    pruner = SlimGPT(linear, "layer 0 test")
    # The accumulation is in fp32; the solve alone is compared here.
    pruner.hessian = hessian_of(inputs)
    return pruner


def count_of(columns: int, unit: int, sparsity: float, groups: int = 1) -> int:
    """Units that a ratio removes: rounded in every group, and never all of one."""
    size = columns // unit // groups
    return groups * min(round(size * sparsity), size - 1)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("percdamp", [0.0, 0.01])
@pytest.mark.parametrize(("columns", "unit", "sparsity"), [(48, 8, 0.5), (48, 4, 0.25), (200, 1, 0.5), (96, 1, 0.9)])
def test_same_units_and_weights_as_the_plain_implementation(columns, unit, sparsity, percdamp, compensate):
    weight = torch.randn(16, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = random_inputs(columns)
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(count_of(columns, unit, sparsity), unit, percdamp, compensate)
    expected, removed = struct_prune(weight, hessian_of(inputs), sparsity, unit, percdamp, compensate)
    assert result.pruned_units == removed
    assert result.percdamp == percdamp
    assert torch.allclose(pruner.linear.weight, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_dynamic_group_size_of_a_wide_layer():
    assert list(group_sizes(2600, 1)) == [1024, 266, 64, *[64] * 19, 30]
    assert list(group_sizes(100, 1)) == [64, 36]
    assert list(group_sizes(3, 64)) == [1, 1, 1]
    assert list(group_sizes(0, 1)) == []
    assert list(group_sizes(2600, 1, 1000)) == [1000, 1000, 600]
    assert list(group_sizes(3, 64, 1000)) == [1, 1, 1]


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 600])
def test_inverse_by_blocks(size, monkeypatch):
    monkeypatch.setattr(obs, "INVERSE_BLOCK", 256)
    hessian = hessian_of(random_inputs(size, tokens=2 * size)) + 0.1 * torch.eye(size, dtype=torch.float64)
    inverse, expected = hessian.clone(), torch.linalg.inv(hessian)
    assert invert_in_place(inverse)
    assert (inverse - expected).norm() <= 1e-9 * expected.norm()
    assert torch.allclose(inverse, inverse.T, rtol=1e-10, atol=1e-12 * expected.abs().max().item())


def test_invert_in_place_indefinite_is_told():
    assert not invert_in_place(torch.diag(torch.tensor([1.0, -1.0, 1.0])))


def rank_by_refactorising(weight, hessian, target, unit_size, compensate, selection) -> list[int]:
    """The units that go, in their order, each step on an inverse of the columns that are left."""
    units, removed = weight.shape[1] // unit_size, []
    for count in group_sizes(target, unit_size, selection.column_group):
        left = [u for u in range(units) if u not in removed]
        columns = [u * unit_size + i for u in left for i in range(unit_size)]
        best = least_squares(weight, hessian, [c for c in range(weight.shape[1]) if c not in columns])[0]
        current = best if compensate else weight
        inverse = torch.linalg.inv(hessian[columns][:, columns])
        scores = unit_scores(current[:, columns], diagonal_blocks(inverse, unit_size), selection.exact_heads)
        removed += [left[i] for i in scores.argsort(stable=True)[:count].tolist()]
    return removed


def rank_by_downdates(weight, hessian, target, unit_size, compensate, selection) -> tuple[list[int], torch.Tensor]:
    """The units that go, in their order, and the weights; each step updates the whole inverse."""
    weight, inverse, removed = weight.clone(), torch.linalg.inv(hessian), []
    for count in group_sizes(target, unit_size, selection.column_group):
        scores = unit_scores(weight, diagonal_blocks(inverse, unit_size), selection.exact_heads)
        scores[removed] = torch.inf
        units = scores.argsort(stable=True)[:count].tolist()
        columns = [u * unit_size + i for u in units for i in range(unit_size)]
        solved = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        if compensate:
            weight -= weight[:, columns] @ solved
        inverse -= inverse[:, columns] @ solved
        weight[:, columns] = inverse[columns] = inverse[:, columns] = 0
        inverse[columns, columns] = 1
        removed += units
    return removed, weight


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(
    ("unit", "selection"),
    [
        (1, SelectionOptions()),
        (1, SelectionOptions(column_group=1)),
        (1, SelectionOptions(column_group=7)),
        (6, SelectionOptions()),
        (6, SelectionOptions(exact_heads=True)),
    ],
)
def test_greedy_obs_left_looking_chooses_as_refactorising_and_downdating_do(unit, selection, compensate):
    weight = torch.randn(16, 180, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    hessian = hessian_of(random_inputs(180))
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    pruned, inverse = weight.clone(), torch.linalg.inv(hessian)
    kept = inverse.clone()
    removal = greedy_obs(pruned, inverse, 120 // unit, unit, compensate, selection=selection)
    assert removal.units.tolist() == rank_by_refactorising(weight, hessian, 120 // unit, unit, compensate, selection)
    ranked, downdated = rank_by_downdates(weight, hessian, 120 // unit, unit, compensate, selection)
    assert removal.units.tolist() == ranked
    assert torch.allclose(pruned, downdated, rtol=1e-7, atol=1e-9)
    assert torch.equal(inverse, kept)
    columns = [u * unit + i for u in removal.units.tolist() for i in range(unit)]
    expected = least_squares(weight, hessian, columns)[0] if compensate else weight.clone()
    expected[:, columns] = 0
    assert torch.allclose(pruned, expected, rtol=1e-7, atol=1e-9)


def least_squares(weight: torch.Tensor, hessian: torch.Tensor, gone: list[int]) -> tuple[torch.Tensor, float]:
    """The best weight without the columns ``gone``, and its error ``tr(ΔW H ΔWᵀ)``, by solving the normal equations."""
    rest = [i for i in range(weight.shape[1]) if i not in gone]
    best = torch.zeros_like(weight)
    best[:, rest] = torch.linalg.solve(hessian[rest][:, rest], hessian[rest] @ weight.T).T
    change = weight - best
    return best, ((change @ hessian) * change).sum().item()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("gone", list(itertools.combinations(range(6), 3)))
def test_the_update_is_the_least_squares_optimum_of_every_subset(gone, group, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    hessian = hessian_of(random_inputs(6))
    best, error = least_squares(weight, hessian, list(gone))
    scores = torch.tensor([column not in gone for column in range(6)], dtype=torch.float64)
    monkeypatch.setattr(obs, "unit_scores", lambda *args: scores)
    pruned, selection = weight.clone(), SelectionOptions(column_group=group)
    removal = greedy_obs(pruned, torch.linalg.inv(hessian), 3, 1, True, selection=selection)
    assert sorted(removal.units.tolist()) == list(gone)
    assert torch.allclose(pruned, best, rtol=1e-8, atol=1e-10)
    assert removal.costs.sum().item() == pytest.approx(error, rel=1e-8)
    assert removal.row_costs.sum().item() == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize(
    "selection", [SelectionOptions(), SelectionOptions(exact_heads=True), SelectionOptions(column_group=1)]
)
@pytest.mark.parametrize("unit", [1, 4])
def test_costs_of_the_steps_add_up_to_the_error(selection, unit):
    weight = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hessian = hessian_of(random_inputs(24))
    pruned = weight.clone()
    removal = greedy_obs(pruned, torch.linalg.inv(hessian), 12 // unit, unit, True, selection=selection)
    change = weight - pruned
    assert removal.costs.sum().item() == pytest.approx(((change @ hessian) * change).sum().item(), rel=1e-8)
    assert sum(removal.steps) == len(removal.units) == len(removal.units.unique()) == 12 // unit


@pytest.mark.parametrize("seed", range(5))
def test_exact_scores_are_the_errors_of_removing_each_head_alone(seed):
    weight = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    hessian = hessian_of(random_inputs(12, seed=seed))
    scores = unit_scores(weight, diagonal_blocks(torch.linalg.inv(hessian), 3), exact=True)
    errors = [least_squares(weight, hessian, [3 * head, 3 * head + 1, 3 * head + 2])[1] for head in range(4)]
    assert scores.tolist() == pytest.approx(errors, rel=1e-8)
    chosen = greedy_obs(
        weight.clone(), torch.linalg.inv(hessian), 1, 3, True, selection=SelectionOptions(exact_heads=True)
    )
    assert chosen.units.tolist() == [errors.index(min(errors))]


def test_columns_one_by_one_are_no_worse_than_in_groups():
    weight = torch.randn(16, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = hessian_of(random_inputs(200, tokens=100))
    costs = [
        greedy_obs(
            weight.clone(), torch.linalg.inv(hessian), 100, 1, True, selection=SelectionOptions(column_group=group)
        )
        .costs.sum()
        .item()
        for group in (1, 16, 64)
    ]
    assert costs == sorted(costs)


@pytest.mark.parametrize("seed", range(5))
def test_a_single_column_is_the_best_of_all(seed):
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    hessian = hessian_of(random_inputs(7, seed=seed))
    errors = [least_squares(weight, hessian, [column])[1] for column in range(7)]
    chosen = greedy_obs(weight.clone(), torch.linalg.inv(hessian), target=1, unit_size=1, compensate=True)
    assert chosen.units.tolist() == [errors.index(min(errors))]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_heads_end_in_the_optimum_of_their_subset_and_near_the_best_subset(seed):
    weight = torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    inputs = random_inputs(10, seed=seed)
    hessian = hessian_of(inputs)
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(2, unit_size=2, percdamp=0)

    def error(units: tuple[int, ...]) -> float:
        return least_squares(weight, hessian, [unit * 2 + i for unit in units for i in (0, 1)])[1]

    energy = ((weight @ hessian) * weight).sum().item()
    subsets = sorted(error(units) for units in itertools.combinations(range(5), 2))
    got = error(tuple(result.pruned_units))
    assert result.error_compensated == pytest.approx(got / energy, rel=1e-6)
    # The original's head score is a bound, not the error: it need not find the best subset, but never a bad one.
    assert got <= subsets[len(subsets) // 2]


def test_reported_errors():
    weight, inputs = torch.randn(8, 12, dtype=torch.float64), random_inputs(12)
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(6, percdamp=0.01)
    flat = inputs.reshape(-1, 12)
    output = flat @ weight.T
    zeroed = weight.clone()
    zeroed[:, result.pruned_units] = 0
    for reported, pruned in ((result.error_uncompensated, zeroed), (result.error_compensated, pruner.linear.weight)):
        expected = (flat @ (weight - pruned).T).square().sum() / output.square().sum()
        assert reported == pytest.approx(expected.item(), rel=1e-6)
    assert result.error_compensated < result.error_uncompensated


def test_hessian_does_not_depend_on_batches():
    inputs = random_inputs(10).float()
    pruners = [SlimGPT(nn.Linear(10, 4)) for _ in range(3)]
    pruners[0].add_batch(inputs)
    for sample in inputs:
        pruners[1].add_batch(sample)
    for batch in inputs.split([1, 4, 1]):
        pruners[2].add_batch(batch)
    expected = hessian_of(inputs.double())
    for pruner in pruners:
        assert pruner.hessian.dtype == torch.float32
        assert torch.allclose(pruner.hessian.double(), expected, rtol=1e-5, atol=1e-5 * expected.max().item())


def test_dead_columns_go_first():
    weight, inputs = torch.randn(4, 20, dtype=torch.float64), random_inputs(20)
    inputs[..., [2, 11]] = 0
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(2, percdamp=0.01)
    assert result.pruned_units == [2, 11]
    assert result.error_compensated == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(("unit", "sparsity"), [(1, 0.125), (4, 0.25), (4, 0.5)])
def test_struct_prune_dead_columns_of_kept_units_keep_their_weights(unit, sparsity, compensate):
    """Chosen and compensated as in the original, which zeroes dead columns; the kept ones are as they were."""
    weight = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    inputs, dead = random_inputs(24), [0, 1, 5, 6, 14, 23]
    inputs[..., dead] = 0
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(count_of(24, unit, sparsity), unit, 0.01, compensate)
    expected, removed = struct_prune(weight, hessian_of(inputs), sparsity, unit, 0.01, compensate)
    gone = [u * unit + i for u in removed for i in range(unit)]
    kept_dead = [column for column in dead if column not in gone]
    assert result.pruned_units == removed and kept_dead
    assert not expected[:, kept_dead].any()
    assert torch.equal(pruner.linear.weight[:, kept_dead], weight[:, kept_dead])
    assert not pruner.linear.weight[:, gone].any()
    live = [column for column in range(24) if column not in dead]
    assert torch.allclose(pruner.linear.weight[:, live], expected[:, live], rtol=1e-6, atol=1e-6)
    flat = inputs.reshape(-1, 24)
    error = (flat @ (weight - pruner.linear.weight).T).square().sum() / (flat @ weight.T).square().sum()
    assert result.error_compensated == pytest.approx(error.item(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("unit", "groups"), [(1, 1), (4, 1), (12, 2)])
def test_struct_prune_without_a_unit_to_remove_leaves_the_weight(unit, groups, dtype, monkeypatch):
    weight, inputs = torch.randn(4, 24, dtype=torch.float64).to(dtype), random_inputs(24)
    inputs[..., [2, 11]] = 0
    pruner = make_pruner(weight, inputs)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *args, **options: pytest.fail("factorised"))
    result = pruner.struct_prune(0, unit, num_groups=groups)
    assert torch.equal(pruner.linear.weight, weight)
    assert (result.pruned_units, result.kept_units) == ([], list(range(24 // unit)))
    assert (result.error_uncompensated, result.error_compensated, result.percdamp) == (0, 0, 0.01)
    assert pruner.error_curve(0, unit, num_groups=groups).tolist() == [0]


def test_struct_prune_errors_of_a_rank_deficient_hessian_are_not_negative():
    """Rounded to fp32 such a Hessian has negative eigenvalues."""
    inputs = random_inputs(32, tokens=3, samples=1)
    hessian = hessian_of(inputs).float()
    values, vectors = torch.linalg.eigh(hessian.double())
    assert values[0] < 0
    for count in (8, 24, 31):
        pruner = make_pruner(torch.eye(4, 32, dtype=torch.float64) + vectors[:, 0], inputs)
        pruner.hessian = hessian.clone()
        result = pruner.struct_prune(count)
        assert min(result.error_uncompensated, result.error_compensated) >= 0


def test_output_energy_is_that_of_the_outputs():
    weight, inputs = torch.randn(6, 600, dtype=torch.float64), random_inputs(600, tokens=40)
    expected = 2 / len(inputs) * (inputs @ weight.T).square().sum()
    assert output_energy(weight, hessian_of(inputs)) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(("groups", "sparsity"), [(2, 0.3), (3, 0.5), (4, 0.4), (6, 0.7)])
@pytest.mark.parametrize("seed", range(3))
def test_groups_lose_equally_many_units(groups, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(8, 24, dtype=torch.float64, generator=generator), random_inputs(24, seed=seed)
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(count_of(24, 2, sparsity, groups), unit_size=2, percdamp=0.01, num_groups=groups)
    expected, removed = struct_prune(weight, hessian_of(inputs), sparsity, 2, 0.01, groups=groups)
    assert result.pruned_units == removed
    assert torch.allclose(pruner.linear.weight, expected, rtol=1e-6, atol=1e-6)
    size = 12 // groups
    losses = [sum(unit // size == group for unit in removed) for group in range(groups)]
    assert losses == [min(round(size * sparsity), size - 1)] * groups


@pytest.mark.parametrize(("count", "unit", "groups"), [(6, 2, 3), (4, 2, 3), (3, 4, 1), (-1, 1, 1), (13, 1, 1)])
def test_struct_prune_of_all_units_or_of_uneven_groups_is_refused(count, unit, groups):
    pruner = make_pruner(torch.randn(4, 12, dtype=torch.float64), random_inputs(12))
    with pytest.raises(ValueError, match=f"{count} units of {12 // unit} in {groups} groups"):
        pruner.struct_prune(count, unit, num_groups=groups)


@pytest.mark.parametrize("unit", [1, 4])
def test_rank_deficient_hessian_raises_the_damping(caplog, unit):
    inputs = random_inputs(32, tokens=3, samples=2)
    weight = torch.randn(8, 32, dtype=torch.float64)
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(count_of(32, unit, 0.5), unit, percdamp=0)
    assert result.percdamp > 0
    assert f"raised to {result.percdamp:g}" in caplog.text
    assert "layer 0 test" in caplog.text
    assert torch.isfinite(pruner.linear.weight).all()
    assert result.error_compensated <= result.error_uncompensated


def test_damping_steps():
    assert list(damping_steps(0.0))[:3] == pytest.approx([0, 1e-6, 1e-5])
    assert list(damping_steps(0.01)) == pytest.approx([0.01, 0.1, 1.0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_name_the_layer(value):
    pruner = SlimGPT(nn.Linear(8, 8), "layer 3 self_attn.o_proj")
    before = pruner.linear.weight.clone()
    inputs = torch.randn(2, 4, 8)
    inputs[0, 0, 0] = value
    pruner.add_batch(inputs)
    with pytest.raises(UserError, match=r"layer 3 self_attn\.o_proj.*--dtype"):
        pruner.struct_prune(4)
    assert torch.equal(pruner.linear.weight, before)


def test_free_lets_go_of_the_hessian():
    pruner = SlimGPT(nn.Linear(8, 8))
    hessian = weakref.ref(pruner.hessian)
    pruner.release()
    assert hessian() is None


def test_oldest_torch_has_what_only_a_gpu_runs():
    """The overload of ``add_gram`` and the class of device errors, which came with torch 2.8."""
    assert "dtype" in torch.ops.aten.mm.overloads()
    assert issubclass(torch.AcceleratorError, RuntimeError)
