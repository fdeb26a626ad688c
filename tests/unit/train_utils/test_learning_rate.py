"""Default learning rates of runs on plain text, against full sums and the rates measured on two models."""

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from slim_utils.layerwise.offload import OffloadedModel
from tests.tiny_models import make_tiny
from train_utils.finetune_args import parse_args
from train_utils.learning_rate import (
    WEIGHT_RATE,
    layer_matrices,
    root_mean_square,
    set_text_learning_rate,
    text_learning_rate,
)
from train_utils.text_defaults import ALL_WEIGHTS, BLOCK_WEIGHTS, LORA, SCALES


@pytest.mark.parametrize(
    ("magnitude", "hidden_size", "rates"),
    [
        # SmolLM2-135M and Gemma-3-270M.
        (0.196, 576, {ALL_WEIGHTS: 3e-4, BLOCK_WEIGHTS: 3e-4, LORA: 2e-3, SCALES: 5e-3}),
        (0.035, 640, {ALL_WEIGHTS: 5e-5, BLOCK_WEIGHTS: 5e-5, LORA: 4e-4, SCALES: 5e-3}),
    ],
)
def test_text_learning_rate_follows_the_magnitude_of_the_weights(magnitude, hidden_size, rates):
    assert {part: text_learning_rate(part, magnitude, hidden_size) for part in rates} == rates


def test_root_mean_square_is_that_of_all_values():
    torch.manual_seed(0)
    # Columns of different magnitudes: a stride of a row's length would meet one of them only.
    matrices = [torch.randn(4096, 64) * torch.linspace(0.1, 10, 64), torch.randn(4, 128, 32), torch.full((3, 5), 2.0)]
    exact = torch.cat([matrix.flatten() for matrix in matrices]).double().square().mean().sqrt().item()
    assert root_mean_square(matrices) == pytest.approx(exact, rel=0.03)


def test_root_mean_square_of_experts_meets_all_their_rows():
    torch.manual_seed(0)
    experts = torch.randn(64, 64, 16)
    experts[:, 0] *= 30
    assert root_mean_square([experts]) == pytest.approx(experts.square().mean().sqrt().item(), rel=0.5)


def test_layer_matrices_on_disk_are_those_in_memory(tmp_path):
    model = make_tiny("llama")
    model.save_pretrained(tmp_path / "model")
    host = OffloadedModel(str(tmp_path / "model"), "auto", False, tmp_path / "scratch")
    in_memory, on_disk = (list(layer_matrices(source)) for source in (model, host))
    host.close()
    assert len(in_memory) == 7 * model.config.num_hidden_layers
    assert root_mean_square(in_memory) == pytest.approx(root_mean_square(on_disk), rel=1e-6)


def test_layer_matrices_are_without_the_decay_rates_of_mamba():
    model = make_tiny("jamba")
    state = {name: parameter for name, parameter in model.named_parameters() if name.endswith("A_log")}
    assert state and all(parameter.ndim == 2 for parameter in state.values())
    before = root_mean_square(layer_matrices(model))
    for parameter in state.values():
        parameter.data.fill_(2.0)
    assert root_mean_square(layer_matrices(model)) == before


@pytest.mark.parametrize("lr", ["auto", 5e-5])
def test_set_text_learning_rate_replaces_the_rate_that_deepspeed_got_from_the_flag(tmp_path, checkpoint, lr):
    text = tmp_path / "text.txt"
    text.write_text("a b c")
    argv = ["--model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--train_text", str(text)]
    args = parse_args(argv)
    flag = args.training.learning_rate
    args.training.deepspeed = {"optimizer": {"params": {"lr": lr}}, "scheduler": {"params": {"warmup_max_lr": 1.0}}}
    filled = HfDeepSpeedConfig(args.training.deepspeed)
    filled.config["optimizer"]["params"]["lr"] = flag
    args.training.hf_deepspeed_config = filled
    model = make_tiny("llama")
    set_text_learning_rate(args, model)
    rate = text_learning_rate(BLOCK_WEIGHTS, root_mean_square(layer_matrices(model)), model.config.hidden_size)
    assert args.training.learning_rate == rate != flag
    config = args.training.hf_deepspeed_config.config
    # The file's own number stays, also where it is the default of the flag.
    assert config["optimizer"]["params"]["lr"] == (rate if lr == "auto" else lr)
    assert config["scheduler"]["params"]["warmup_max_lr"] == 1.0


def test_set_text_learning_rate_is_recorded_where_it_equals_the_default_of_the_trainer(tmp_path, checkpoint):
    text = tmp_path / "text.txt"
    text.write_text("a b c")
    argv = ["--model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--train_text", str(text)]
    args, model = parse_args(argv), make_tiny("llama")
    flag = args.training.learning_rate
    factor = flag / WEIGHT_RATE / root_mean_square(layer_matrices(model))
    for matrix in layer_matrices(model):
        matrix.data *= factor
    set_text_learning_rate(args, model)
    assert args.training.learning_rate == flag == args.flat()["learning_rate"]
