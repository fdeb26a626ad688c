"""Pruning on a CUDA device against the CPU, and the later stages on a CUDA device."""

import json

import pytest
import torch

import model_evaluate
import model_finetune
import model_slimming
from ppl_eval.ppl_dataset import EvalKey
from ppl_eval.streamed_eval import evaluate_layers, evaluate_on
from slim_utils.allocation.planner import plans_of
from slim_utils.allocation.refinement import measure_around
from slim_utils.allocation.sensitivity import measure
from slim_utils.families import find_family
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import read_pruning
from slim_utils.slimgpt import add_gram
from tests.integration.task_files import write_tasks
from tests.integration.test_stream import tensors
from tests.processes import run_ranks
from tests.tiny_models import make_tiny
from train_utils.finetune_args import parse_args

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [64, 700])
def test_add_gram_of_half_precision_is_exact(columns, dtype):
    tokens = torch.randn(300, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = torch.zeros(columns, columns, device="cuda")
    add_gram(gram, tokens.cuda())
    add_gram(gram, tokens.cuda())
    expected = 2 * tokens.double().T @ tokens.double()
    assert torch.allclose(gram.triu().cpu().double(), expected.triu(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", ["gqa", "opt", "olmo2", "mixtral"])
@pytest.mark.parametrize("cache_dev", ["cuda", "cpu"])
def test_prune_layers_on_a_gpu_gives_the_weights_of_the_cpu(samples, cache_dev, variant):
    on_cpu, on_gpu = make_tiny(variant), make_tiny(variant)
    ratios = [0.3, 0.5, 0.6, 0.7]
    devices = {on_cpu: ("cpu", "cpu"), on_gpu: ("cuda", cache_dev)}
    masks = []
    for model, (device, cache) in devices.items():
        settings = PruningSettings(torch.device(device), torch.device(cache), batch_samples=3)
        masks.append(
            prune_layers(model, find_family(model.config), samples, plans_of(model, ratios, settings), settings)[0]
        )
    assert masks[0] == masks[1]
    assert on_gpu.device.type == "cpu"
    for name, expected in on_cpu.state_dict().items():
        assert torch.allclose(on_gpu.state_dict()[name], expected, rtol=1e-3, atol=1e-3), name


# Biases by head, transposed weights, inputs by token and shared keys, other mixers, latent attention, and experts.
@pytest.mark.parametrize("cache_dev", ["cuda", "cpu"])
@pytest.mark.parametrize("variant", ["bloom", "gpt2", "gemma4_text", "jamba", "qwen3_next", "deepseek_v3", "gpt_oss"])
def test_kinds_of_families_in_half_precision_run_on_a_gpu(samples, variant, cache_dev):
    model = make_tiny(variant, torch.bfloat16)
    host = ResidentModel(model, find_family(model.config))
    settings = PruningSettings(torch.device("cuda"), torch.device(cache_dev), batch_samples=3)
    layers = range(model.config.num_hidden_layers)
    plans = plans_of(model, [0.5] * len(layers), settings)
    measure(host, samples, layers, settings)
    measure_around(host, samples, samples[:4, :8], plans, settings)
    masks, _ = prune_layers(model, host.family, samples, plans, settings, starts=samples[:4, :8])
    assert [settings.size_mask(mask.shape, plan).kept_width for mask, plan in zip(masks, plans, strict=True)] == [
        mask.kept_width for mask in masks
    ]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    sets = {EvalKey("text", 16): samples}
    by_layer = evaluate_layers(host, settings.device, sets)[0]["perplexity"]
    assert by_layer == pytest.approx(evaluate_on(host, settings.device, sets)[0]["perplexity"], rel=0.02)


@pytest.mark.parametrize("cache_dev", ["cuda", "cpu"])
def test_model_slimming_streamed_on_a_gpu_gives_the_same_bits(checkpoint, text_file, tmp_path, cache_dev):
    argv = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.5]
    argv += ["--cache_dev", cache_dev, "--save_pruned_weights", "--eval_datasets", text_file, "--eval_seqlens", 16]
    for name, more in (("whole", []), ("streamed", ["--stream"])):
        arguments = [*argv, *more, "--save_dir", tmp_path / name]
        model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))
    for folder in (".", "pruned_weights"):
        whole, streamed = tensors(tmp_path / "whole" / folder), tensors(tmp_path / "streamed" / folder)
        assert whole.keys() == streamed.keys()
        assert all(torch.equal(streamed[key], whole[key]) for key in whole)
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "streamed")]
    values = [record["perplexity"][0]["perplexity"] for record in records]
    assert values[1] == pytest.approx(values[0], rel=1e-3)


def test_model_slimming_with_search_on_a_gpu_gives_the_plan_of_the_cpu(checkpoint, text_file, tmp_path):
    argv = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--skip_evaluate"]
    argv += ["--target_ratio", 0.3, "--allocation", "search"]
    for device in ("cpu", "cuda"):
        arguments = [*argv, "--device", device, "--save_dir", tmp_path / device]
        model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))
    masks = [read_pruning(tmp_path / device / "pruning.json") for device in ("cpu", "cuda")]
    for on_cpu, on_gpu in zip(*masks, strict=True):
        assert len(on_cpu.kept_heads) == len(on_gpu.kept_heads)
        # Losses differ by rounding; for nearly equal losses, columns may differ.
        assert abs(len(on_cpu.kept_columns) - len(on_gpu.kept_columns)) <= 2


@pytest.mark.parametrize("lora", ["true", "false"])
def test_mask_training_and_evaluation_on_a_gpu_run(checkpoint, text_file, instruction_file, tmp_path, lora):
    slim, out = tmp_path / "slim", tmp_path / "out"
    argv = [checkpoint, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.5]
    argv += ["--skip_evaluate", "--save_pruned_weights", "--save_dir", slim]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))

    argv = ["--model_name_or_path", slim, "--output_dir", out, "--data_path", instruction_file, "--bf16", "true"]
    argv += ["--use_lora", lora, "--is_mask_training", "true", "--learning_rate", 1e-2, "--val_dataset_size", 8]
    argv += ["--extra_val_set", f"wikitext2={text_file}", "--eval_seqlens", 16, 32, "--extra_val_seqlen", 16]
    argv += ["--prompt_template_name", "none", "--cache_dataset", "false", "--gradient_accumulation_steps", 2]
    model_finetune.main(parse_args(list(map(str, argv))))
    record = json.loads((out / "run.json").read_text())
    assert record["mask"]["nonzero_after_training"] == record["mask"]["moved_by_optimizer"] == 0
    assert record["peak_memory_mib"]["gpu"] > 0

    (tmp_path / "tasks" / "piqa").mkdir(parents=True)
    rows = [{"goal": f"w{i + 3}", "sol1": "w3", "sol2": "w4 w5", "label": i % 2} for i in range(10)]
    file = tmp_path / "tasks" / "piqa" / "validation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = out / "lora_fused_model" if lora == "true" else out
    argv = ["--model", model, "--tasks", "piqa", "--data_dir", tmp_path / "tasks", "--batch_size", "auto"]
    model_evaluate.main(model_evaluate.build_parser().parse_args(list(map(str, argv))))


def test_model_evaluate_divided_or_in_two_processes_gives_the_figures_of_one_gpu(checkpoint, tmp_path):
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    argv = ["--model", checkpoint, "--tasks", "arc_easy,piqa", "--data_dir", tmp_path / "tasks", "--batch_size", "auto"]
    ways = {"one": (1, []), "divided": (1, ["--parallelize"]), "two": (2, ["--device", "cuda:0"])}
    records = {}
    for name, (processes, flags) in ways.items():
        path = tmp_path / f"{name}.json"
        process = run_ranks(processes, "model_evaluate.py", *argv, *flags, "--output_path", path)
        assert process.returncode == 0, process.stderr
        records[name] = json.loads(path.read_text())
        assert records[name]["peak_memory_mib"]["gpu"] > 0
    for name in ("divided", "two"):
        for task, values in records["one"]["results"].items():
            assert records[name]["results"][task] == pytest.approx(values), (name, task)
