"""Device memory that is full anywhere in a run: less at once, the same result, and nothing lost."""

import json
import math

import pytest
import torch

from ppl_eval import streamed_eval
from ppl_eval.ppl_dataset import EvalKey
from ppl_eval.ppl_eval import evaluate
from ppl_eval.streamed_eval import evaluate_on
from slim_utils.allocation import refinement
from slim_utils.allocation import sensitivity as search
from slim_utils.allocation.planner import plans_of
from slim_utils.allocation.refinement import measure_around
from slim_utils.allocation.sensitivity import measure
from slim_utils.families import find_family
from slim_utils.layerwise import pruner
from slim_utils.layerwise.layer_forward import LayerForward
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import LayerStore
from slim_utils.layerwise.settings import PruningSettings
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")
# Stands for a GPU: it is the CPU, by another name.
ELSEWHERE = torch.device("cpu", 0)
RATIOS = [0.2, 0.35, 0.5, 0.6]


def walk(model, samples, ratios=RATIOS, store=None, starts=None, **settings):
    """Masks and reports of pruning ``model`` in place."""
    family, settings = find_family(model.config), PruningSettings(**{"device": CPU, "cache_dev": CPU, **settings})
    return prune_layers(model, family, samples, plans_of(model, ratios, settings), settings, store, starts=starts)


def full_where(monkeypatch, name, is_full):
    """Let memory be full where ``is_full(replay, *args)`` holds at the call of a method of replays; its batch sizes."""
    method, seen = getattr(LayerForward, name), []

    def limited(self, *args):
        seen.append(len(args[0]) if args else None)
        if is_full(self, *args):
            raise torch.OutOfMemoryError("full")
        return method(self, *args)

    monkeypatch.setattr(LayerForward, name, limited)
    return seen


def same_weights(one, other):
    for name, weight in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], weight, rtol=1e-3, atol=1e-3), name


# The latter has inputs by token, and its later layers reuse keys and values of the first two.
@pytest.mark.parametrize("name", ["gqa", "gemma4_text of inputs by layer"])
@pytest.mark.parametrize(
    ("ratios", "failing", "batch_samples"),
    [(RATIOS, 2, 3), (RATIOS, 5, 5), ([0.0, 0.0, 0.5, 0.6], 3, 3), ([0.0, 0.0, 0.5, 0.6], 8, 5)],
)
def test_prune_layers_full_while_advancing_goes_on_from_the_batch(
    ratios, failing, batch_samples, name, samples, monkeypatch, caplog
):
    """Also in layers that are not pruned; each time after another batch, the last of which are of other sizes."""
    whole, parts, starts = make_tiny(name), make_tiny(name), samples[:7, :8]
    expected, _ = walk(whole, samples, ratios, starts=starts)
    advancing, run = [], []
    advance = LayerForward.advance

    def watched(self):
        advancing.append(True)
        try:
            advance(self)
        finally:
            advancing.pop()

    monkeypatch.setattr(LayerForward, "advance", watched)
    full_where(monkeypatch, "_run", lambda replay, batch: advancing and (run.append(len(batch)) or len(run) == failing))
    masks, reports = walk(parts, samples, ratios, starts=starts, batch_samples=batch_samples)
    assert masks == expected
    same_weights(whole, parts)
    assert f"retrying with {batch_samples // 2} samples per forward" in caplog.text
    assert [report.batch_samples for report in reports][-1] == batch_samples // 2


# Of torch's allocator, of the driver, and of a library that allocates by itself.
FULL = [
    torch.OutOfMemoryError("full"),
    torch.AcceleratorError("CUDA error: out of memory", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", FULL)
def test_prune_layers_full_for_activations_keeps_them_on_the_host(error, samples, monkeypatch, caplog):
    capture = pruner.capture_layer_kwargs

    def limited(model, layers, samples, settings, processes):
        if settings.cache_dev != CPU:
            raise error
        return capture(model, layers, samples, settings, processes)

    monkeypatch.setattr(pruner, "capture_layer_kwargs", limited)
    model = make_tiny("gqa")
    masks, _ = walk(model, samples, cache_dev=ELSEWHERE)
    assert masks == walk(make_tiny("gqa"), samples)[0]
    assert "the embeddings: out of device memory; retrying with 128 samples per forward, activations on cpu" in (
        caplog.text
    )


@pytest.mark.parametrize("name", ["gqa", "gemma4_text of inputs by layer"])
def test_prune_layers_full_for_a_layer_keeps_activations_on_the_host(name, samples, monkeypatch, caplog):
    fetch, calls = ResidentModel.onload, []

    def limited(self, index, device):
        calls.append(index)
        if calls.count(2) == 1 and index == 2:
            raise torch.OutOfMemoryError("full")
        return fetch(self, index, device)

    monkeypatch.setattr(ResidentModel, "onload", limited)
    masks, reports = walk(make_tiny(name), samples, cache_dev=ELSEWHERE)
    assert masks == walk(make_tiny(name), samples)[0]
    assert [report.cache_dev for report in reports] == ["cpu:0", "cpu:0", "cpu", "cpu"]


class Killed(BaseException):
    """Ends a run."""


def test_prune_layers_resumed_after_full_memory_begins_with_what_fits(samples, tmp_path, monkeypatch):
    whole, parts, again = (make_tiny("gqa") for _ in range(3))
    expected, _ = walk(whole, samples)
    seen = full_where(monkeypatch, "_run", lambda replay, batch: len(batch) > 2)
    store = LayerStore(tmp_path / "out")
    store.open({}, False)

    def killed(layer, family, report):
        if report.layer == 2:
            raise Killed
        LayerStore.save(store, layer, family, report)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(store, "save", killed)
        walk(parts, samples, store=store)
    assert sorted(set(seen)) == [2, 4, 8]
    seen.clear()
    store = LayerStore(tmp_path / "out")
    store.open({}, True)
    masks, reports = walk(again, samples, store=store)
    assert set(seen) == {2}
    assert masks == expected and [report.batch_samples for report in reports] == [2, 2, 2, 2]
    same_weights(whole, again)


def test_prune_layers_restoring_where_memory_is_full_goes_on(samples, tmp_path, monkeypatch):
    """Layers of a run that had more memory."""
    whole, again = make_tiny("gqa"), make_tiny("gqa")
    store = LayerStore(tmp_path / "out")
    store.open({}, False)
    expected, _ = walk(whole, samples, store=store)
    (store.folder / "layer_0003.safetensors").unlink()
    seen = full_where(monkeypatch, "_run", lambda replay, batch: len(batch) > 2)
    store = LayerStore(tmp_path / "out")
    store.open({}, True)
    assert walk(again, samples, store=store)[0] == expected
    assert sorted(set(seen)) == [2, 4, 8]
    assert json.loads((store.folder / "reduced.json").read_text())["batch_samples"] == 2
    same_weights(whole, again)


def losses(measured):
    return [units.loss for layer in measured.values() for units in (layer.heads, layer.columns)]


@pytest.mark.parametrize("error", FULL)
def test_measure_where_memory_is_full_gives_the_same_losses(error, samples, tmp_path, monkeypatch, caplog):
    model = make_tiny("gqa")
    host, settings = ResidentModel(model, find_family(model.config)), PruningSettings(CPU, CPU)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = losses(measure(host, samples, range(4), settings))
    divergence, calls = search.KLProbe.divergence, []

    def limited(self, index):
        calls.append(index)
        if len(calls) == 3:
            raise error
        return divergence(self, index)

    monkeypatch.setattr(search.KLProbe, "divergence", limited)
    found = measure(host, samples, range(4), settings, tmp_path / "measured.json")
    assert losses(found) == pytest.approx(expected, rel=0.05)
    # What was measured is not measured again.
    assert calls == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert "measuring: out of device memory; retrying with 4 samples" in caplog.text
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_measure_around_where_memory_is_full_gives_the_same_losses(samples, monkeypatch, caplog):
    model = make_tiny("gqa")
    host, settings = ResidentModel(model, find_family(model.config)), PruningSettings(CPU, CPU)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plans = plans_of(model, RATIOS, settings)
    expected = measure_around(host, samples, None, plans, settings)
    divergence, calls = refinement.KLProbe.divergence, []

    def limited(self, index):
        calls.append(index)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("full")
        return divergence(self, index)

    monkeypatch.setattr(refinement.KLProbe, "divergence", limited)
    found = measure_around(host, samples, None, plans, settings)
    for loss, again in zip(losses(expected), losses(found), strict=True):
        assert (loss is None) == (again is None)
        assert again is None or math.isclose(loss, again, rel_tol=0.05)
    assert "refining: out of device memory; retrying with 4 samples" in caplog.text
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def full_on_device(monkeypatch, model):
    """Let ``model`` as a whole never fit on ``ELSEWHERE``."""
    move = type(model).to

    def to(self, device):
        if device == ELSEWHERE:
            raise torch.OutOfMemoryError("full")
        return move(self, device)

    monkeypatch.setattr(type(model), "to", to)


@pytest.mark.parametrize("known", [True, False])
def test_evaluate_on_a_device_that_is_too_small_goes_layer_by_layer(samples, known, monkeypatch, caplog):
    model = make_tiny("gqa")
    host, sets = ResidentModel(model, find_family(model.config)), {EvalKey("text", 16): samples}
    expected = evaluate(model, sets)[0]["perplexity"]
    if known:
        # As a GPU's would be: it is seen before.
        monkeypatch.setattr(streamed_eval, "free_memory", lambda device: 1000)
        device = type("Device", (), {"type": "cuda"})()
        monkeypatch.setattr(streamed_eval, "empty_cache", lambda device: None)
        monkeypatch.setattr(
            streamed_eval, "precomputed_layer_outputs", lambda host, device, *rest: PRECOMPUTED(host, CPU, *rest)
        )
    else:
        full_on_device(monkeypatch, model)
        device = ELSEWHERE
    found = evaluate_on(host, device, sets)
    assert found[0]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert "evaluating layer by layer" in caplog.text


PRECOMPUTED = streamed_eval.precomputed_layer_outputs


def test_evaluate_on_with_room_for_a_few_windows_takes_smaller_batches(samples, monkeypatch, caplog):
    model = make_tiny("gqa")
    host, sets = ResidentModel(model, find_family(model.config)), {EvalKey("text", 16): samples}
    expected = evaluate(model, sets)[0]["perplexity"]
    full_on_device(monkeypatch, model)
    full_where(monkeypatch, "_run", lambda replay, batch: len(batch) > 2)
    assert evaluate_on(host, ELSEWHERE, sets)[0]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert "evaluation: out of device memory; retrying with 2 samples per forward" in caplog.text
