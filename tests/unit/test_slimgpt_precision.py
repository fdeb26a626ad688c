"""Precision, fallbacks and memory of the solve."""

import pytest
import torch

from slim_utils import slimgpt
from slim_utils.obs import (
    invert_in_place,
)
from tests.processes import run_python
from tests.reference_slimgpt import hessian_of, struct_prune
from tests.unit.test_slimgpt import make_pruner, random_inputs


def activations_like(columns: int, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """Inputs (4, tokens, columns) with a spectrum that falls by three orders of magnitude, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, -3, columns, dtype=torch.float64)
    return torch.randn(4, tokens, columns, generator=generator, dtype=torch.float64) * spectrum @ directions


@pytest.mark.parametrize(("unit", "count"), [(1, 150), (30, 4)])
def test_struct_prune_in_fp32_nearly_the_fp64_solution(unit, count, caplog):
    weight, inputs = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)), activations_like(300)
    results, weights = [], []
    for dtype in (torch.float64, torch.float32):
        pruner = make_pruner(weight, inputs)
        pruner.hessian = pruner.hessian.float()
        results.append(pruner.struct_prune(count, unit, solve_dtype=dtype))
        weights.append(pruner.linear.weight.detach())
    assert [result.solve_dtype for result in results] == ["float64", "float32"]
    assert {result.solve_device for result in results} == {"cpu"}
    exact, single = (set(result.pruned_units) for result in results)
    assert len(exact & single) >= 0.98 * count
    assert results[1].error_compensated == pytest.approx(results[0].error_compensated, rel=1e-3)
    if exact == single:
        assert (weights[0] - weights[1]).norm() <= 1e-3 * weights[0].norm()
    assert not caplog.records


def test_struct_prune_in_fp32_of_an_ill_conditioned_hessian_is_solved_in_fp64(caplog):
    """Two columns that differ by a hundred-thousandth: positive-definite, but not to fp32."""
    weight, inputs = torch.randn(16, 64), random_inputs(64, tokens=200)
    inputs[..., 1] = inputs[..., 0] * (1 + 1e-5 * torch.randn(inputs.shape[:2], dtype=torch.float64))
    for percdamp, warned in ((0.01, False), (0.0, True)):
        caplog.clear()
        single, exact = make_pruner(weight, inputs), make_pruner(weight, inputs)
        result = single.struct_prune(32, percdamp=percdamp, solve_dtype=torch.float32)
        expected = exact.struct_prune(32, percdamp=percdamp)
        assert ("layer 0 test: ill-conditioned in fp32; solving in fp64 on the CPU" in caplog.text) == warned
        assert result.solve_dtype == ("float64" if warned else "float32")
        assert result.error_compensated == pytest.approx(expected.error_compensated, rel=1e-2)


def test_a_fallback_is_where_the_next_solve_begins(monkeypatch, caplog):
    weight, inputs = torch.randn(16, 64), random_inputs(64, tokens=200)
    inputs[..., 1] = inputs[..., 0] * (1 + 1e-5 * torch.randn(inputs.shape[:2], dtype=torch.float64))
    dtypes = []
    monkeypatch.setattr(slimgpt, "invert_in_place", lambda H: dtypes.append(H.dtype) or invert_in_place(H))
    pruner = make_pruner(weight, inputs)
    for _ in range(2):
        pruner.error_curve(32, percdamp=0.0, solve_dtype=torch.float32)
    assert dtypes == [torch.float32, torch.float64]
    assert caplog.text.count("ill-conditioned in fp32") == 1


# cuSOLVER allocates its handle by itself.
@pytest.mark.parametrize(
    ("failing", "error"),
    [
        (
            "invert_in_place",
            RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
        ),
        (
            "invert_in_place",
            RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
        ),
        ("greedy_obs", torch.OutOfMemoryError("full")),
    ],
)
def test_struct_prune_out_of_device_memory_solves_on_the_cpu(failing, error, monkeypatch, caplog):
    weight, inputs = torch.randn(8, 32), random_inputs(32)
    expected = make_pruner(weight, inputs).struct_prune(16)
    # The weights are on a device that is not the one called the CPU.
    monkeypatch.setattr(slimgpt, "CPU", torch.device("cpu", 0))
    calls, function = [], getattr(slimgpt, failing)

    def full_at_first(*args):
        calls.append(args)
        if len(calls) == 1:
            raise error
        return function(*args)

    monkeypatch.setattr(slimgpt, failing, full_at_first)
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(16, solve_dtype=torch.float32)
    assert "layer 0 test: out of device memory; solving in fp64 on the CPU" in caplog.text
    assert (result.pruned_units, result.solve_dtype) == (expected.pruned_units, "float64")


def test_the_inverse_is_computed_once_for_the_curve_and_the_pruning(monkeypatch):
    calls = []
    monkeypatch.setattr(slimgpt, "invert_in_place", lambda H: calls.append(H) or invert_in_place(H))
    weight, inputs = torch.randn(8, 32), random_inputs(32)
    pruner = make_pruner(weight, inputs)
    curve = pruner.error_curve(20)
    result = pruner.struct_prune(20)
    assert len(calls) == 1
    change = weight - pruner.linear.weight
    damped = hessian_of(inputs)
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    assert curve[-1].item() == pytest.approx(((change.double() @ damped) * change).sum().item(), rel=1e-5)
    pruner.struct_prune(4, percdamp=0.1)
    assert len(calls) == 2
    assert len(result.pruned_units) == 20


MEMORY = """
import torch
from torch import nn
from slim_utils.obs import solve_bytes
from slim_utils.slimgpt import SlimGPT

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def prune(columns, rows, count):
    pruner = SlimGPT(nn.Linear(columns, rows, bias=False))
    pruner.add_batch(torch.randn(1, columns, columns))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    result = pruner.struct_prune(count, solve_dtype=torch.DTYPE)
    assert result.solve_dtype == "DTYPE", result
    return status("VmHWM") - before

torch.set_num_threads(1)
prune(256, 16, 64)
columns, rows, count = 4096, 512, 256
hessian = 4 * columns**2
print(prune(columns, rows, count) + hessian, solve_bytes(columns, rows, count, torch.DTYPE))
"""


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_struct_prune_peak_memory_is_two_matrices_and_the_panels(dtype):
    process = run_python("-c", MEMORY.replace("DTYPE", dtype))
    assert process.returncode == 0, process.stderr
    peak, promised = map(int, process.stdout.split())
    itemsize = getattr(torch, dtype).itemsize
    # Buffers of the linear algebra library take some; a third matrix would take more.
    assert peak <= promised + 0.7 * 4096**2 * itemsize
    assert promised <= (2 * 4096**2 + 4096 * (256 + 5 * 512)) * itemsize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_get_the_fp64_solution_rounded(dtype):
    weight = torch.randn(8, 24, dtype=torch.float64).to(dtype)
    inputs = random_inputs(24)
    pruner = make_pruner(weight, inputs)
    result = pruner.struct_prune(12)
    expected, removed = struct_prune(weight.double(), hessian_of(inputs), 0.5, percdamp=0.01)
    assert result.pruned_units == removed
    assert pruner.linear.weight.dtype == dtype
    assert torch.equal(pruner.linear.weight, expected.to(dtype))
