"""Choices of the layer_choices benchmark that are not options of the suite."""

import pytest
import torch

from benchmarks.layer_choices import (
    GROUPS_OF_16,
    HELD_OUT,
    SEQLEN,
    SHARE,
    Case,
    held_out_windows,
    relative_damping,
    table,
    with_bias,
    with_swaps,
)


@pytest.fixture
def case() -> Case:
    """A linear map of 24 correlated inputs with nonzero mean."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(24, 24, generator=generator)
    inputs = torch.randn(400, 24, generator=generator) @ mixing + 3.0
    weight = torch.randn(16, 24, generator=generator)
    return Case(weight, 1, inputs[:300], inputs[300:], torch.ones(400))


def test_errors_of_a_removed_column_are_those_of_the_outputs(case):
    pruned = case.weight.clone()
    pruned[:, 0] = 0
    expected = (case.held_out[:, :1] * case.weight[:, 0]).square().mean()
    assert case.errors(pruned)[1] == pytest.approx(expected.item(), rel=1e-4)
    assert case.errors(case.weight) == (0, 0)


def test_relative_damping_is_ridge_regression_on_standardised_inputs(case):
    damping, weights = 0.1, []
    errors = Case.errors
    case_errors = lambda self, weight: weights.append(weight) or errors(self, weight)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "errors", case_errors)
        relative_damping(case, damping)
    kept = weights[0].any(0)
    assert (~kept).sum() == round(SHARE * 24)
    gram = (case.inputs.T @ case.inputs).double()
    gram.diagonal().mul_(1 + damping)
    expected = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ case.weight.double().T).T
    assert torch.allclose(weights[0][:, kept].double(), expected, atol=1e-3)


def test_with_bias_of_constant_inputs_has_no_error(case):
    constant = Case(case.weight, 1, case.inputs * 0 + 3.0, case.held_out * 0 + 3.0, case.scale)
    noisy = constant.inputs + 1e-3 * torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    _, held_out = with_bias(Case(case.weight, 1, noisy, constant.held_out, case.scale))
    assert held_out < 1e-4


def test_with_swaps_error_is_not_above_greedy(case):
    greedy = case.errors(case.pruned(selection=GROUPS_OF_16))[0]
    assert with_swaps(case)[0] <= greedy * 1.02


def test_held_out_windows_do_not_overlap_with_samples():
    tokens = torch.arange(64 * SEQLEN)
    samples = torch.stack([tokens[start : start + SEQLEN] for start in (100, 20 * SEQLEN + 7)])
    windows = held_out_windows(tokens, samples)
    assert windows.shape == (HELD_OUT, SEQLEN)
    assert not set(windows.flatten().tolist()) & set(samples.flatten().tolist())


def test_table_has_errors_relative_to_the_paper():
    rows = [
        {"layer": layer, "kind": "heads", "choice": choice, "calibration": factor * layer, "held_out": layer}
        for layer in (1, 2)
        for choice, factor in (("the paper's", 1), ("exact heads", 0.5))
    ]
    assert table({"rows": rows}).endswith("| heads | exact heads | 0.500 | 1.000 |")
