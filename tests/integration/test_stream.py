"""``--stream``: bit-identical outputs with one layer in memory at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import model_slimming
from slim_utils.common.errors import UserError
from slim_utils.families import find_family
from slim_utils.layerwise.offload import OffloadedModel
from slim_utils.layerwise.resume import LayerStore, fingerprint
from tests.processes import run_ranks
from tests.tiny_models import ALL_TINY, make_tiny

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--num_samples", 16, "--seqlen", 32, "--save_pruned_weights", "--device", "cpu"]


def main(*arguments: object) -> None:
    """Run the script in this process."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of a checkpoint, by name."""
    content = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            content |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return content


def assert_same_output(streamed: Path, whole: Path) -> None:
    """Assert the same tensors, the same files except shards, and the same perplexities."""
    for folder in (".", "pruned_weights"):
        got, expected = tensors(streamed / folder), tensors(whole / folder)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) and got[key].dtype == expected[key].dtype for key in expected)
        index = json.loads((streamed / folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == got.keys()
        assert (streamed / folder / "config.json").read_text() == (whole / folder / "config.json").read_text()
        names = [
            {p.name for p in (path / folder).iterdir() if "safetensors" not in p.name} for path in (streamed, whole)
        ]
        assert names[0] == names[1]
    assert (streamed / "pruning.json").read_text() == (whole / "pruning.json").read_text()
    records = [json.loads((path / "run.json").read_text()) for path in (streamed, whole)]
    assert records[0]["sizes"] == records[1]["sizes"]
    for got, expected in zip(*(record["perplexity"] for record in records), strict=True):
        assert got["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)


@pytest.fixture
def argv(text_file) -> list:
    """Flags of a run, without model, ratio and output."""
    return ["--data_file", text_file, *FLAGS, "--eval_datasets", text_file, "--eval_seqlens", 16]


@pytest.mark.parametrize("variant", [*ALL_TINY, "gemma4_text", "gemma4_text of inputs by layer"])
def test_model_slimming_streamed_gives_the_same_bits_for_every_family(variant, argv, tokenizer, tmp_path, monkeypatch):
    make_tiny(variant).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    # Some families require another tokenizer class.
    monkeypatch.setattr(model_slimming, "load_tokenizer", lambda *args: tokenizer)
    ratios = ["--non_uniform", "--min_sparsity", 0.2, "--max_sparsity", 0.6]
    main(tmp_path / "model", *argv, *ratios, "--save_dir", tmp_path / "whole")
    main(tmp_path / "model", *argv, *ratios, "--stream", "--save_dir", tmp_path / "streamed")
    assert_same_output(tmp_path / "streamed", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "streamed", "whole"]
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed" / "pruned_weights")
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.allclose(pruned(ids).logits, masked(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity", 0.4, "--minlayer", 1, "--maxlayer", 3],
        ["--sparsity", 0.4, "--uniform_shapes", "--multiple_of", 8],
        ["--sparsity", 0.4, "--dtype", "bfloat16"],
        ["--sparsity", 0.4, "--cache_dev", "cpu", "--batch_samples", 3],
    ],
)
def test_model_slimming_streamed_gives_the_same_bits_with_flags(flags, checkpoint, argv, tmp_path):
    main(checkpoint, *argv, *flags, "--save_dir", tmp_path / "whole")
    main(checkpoint, *argv, *flags, "--stream", "--save_dir", tmp_path / "streamed")
    assert_same_output(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.slow
def test_model_slimming_streamed_resumes_after_each_layer_and_write(checkpoint, argv, tmp_path, monkeypatch):
    flags = [*argv, "--sparsity", 0.4, "--stream"]
    main(checkpoint, *argv, "--sparsity", 0.4, "--save_dir", tmp_path / "whole")
    writes = 0
    save = model_slimming.write_output.__globals__["StreamedOutput"].write.__globals__["save_tensors_atomic"]
    for stop_at in range(12):
        left = stop_at

        def failing(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            save(*args, **kwargs)

        out = tmp_path / f"out-{stop_at}"
        with monkeypatch.context() as patched:
            patched.setattr("slim_utils.output.writers.save_tensors_atomic", failing)
            try:
                main(checkpoint, *flags, "--save_dir", out)
            except KeyboardInterrupt:
                writes += 1
                assert not out.exists() and LayerStore(out).exists()
        if LayerStore(out).exists():
            main(checkpoint, *flags, "--resume", "--save_dir", out)
        assert_same_output(out, tmp_path / "whole")
    # Four layers and the rest, of two checkpoints.
    assert writes == 10


def test_model_slimming_streamed_with_wrong_input_is_refused(checkpoint, argv, tmp_path):
    with pytest.raises(UserError, match="--stream writes every layer as soon as it is pruned: give --save_dir DIR"):
        main(checkpoint, "--data_file", argv[1], "--sparsity", 0.4, "--device", "cpu", "--stream")
    out = tmp_path / "out"
    LayerStore(out).open({"--stream": False}, False)
    with pytest.raises(UserError, match=r"--stream was False, is True"):
        main(checkpoint, *argv, "--sparsity", 0.4, "--stream", "--resume", "--save_dir", out)
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        main(damaged, *argv, "--sparsity", 0.4, "--stream", "--save_dir", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.unfinished", "damaged"]


@pytest.mark.parametrize("variant", ["gqa", "tied", "mixtral"])
def test_fingerprint_of_an_offloaded_model_depends_on_its_values(variant, tmp_path):
    model = make_tiny(variant)
    model.save_pretrained(tmp_path / "model")
    prints = []
    for _ in range(2):
        host = OffloadedModel(str(tmp_path / "model"), "auto", False, tmp_path / "scratch")
        prints.append(fingerprint(host.model.config, host.sampled_tensors()))
        host.close()
        model.get_parameter(f"{find_family(model.config).layers}.1.self_attn.o_proj.weight").data.mul_(2)
        model.save_pretrained(tmp_path / "model")
    assert prints[0] != prints[1]


def test_model_slimming_streamed_on_two_processes_gives_the_weights_of_one(checkpoint, argv, tmp_path):
    flags = [*argv, "--sparsity", 0.4, "--percdamp", 0.1, "--num_samples", 62]
    main(checkpoint, *flags, "--save_dir", tmp_path / "whole")
    flags = [*flags, "--stream", "--save_dir", tmp_path / "streamed"]
    process = run_ranks(2, "model_slimming.py", checkpoint, *flags)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "streamed" / "pruning.json").read_text() == (tmp_path / "whole" / "pruning.json").read_text()
    expected = tensors(tmp_path / "whole")
    for key, tensor in tensors(tmp_path / "streamed").items():
        assert (tensor - expected[key]).abs().max() <= 1e-5 * expected[key].abs().max(), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streamed", "whole"]


def test_model_slimming_streamed_holds_a_single_layer(checkpoint, argv, tmp_path, monkeypatch):
    """Counts loaded layers of a tiny model; ``test_stream_memory.py`` measures the memory of a large one."""
    onload, counts = OffloadedModel.onload, []

    def counted(self, index, device):
        layer = onload(self, index, device)
        loaded = [any(not parameter.is_meta for parameter in layer.parameters()) for layer in self.layers]
        counts.append(sum(loaded))
        return layer

    monkeypatch.setattr(OffloadedModel, "onload", counted)
    main(checkpoint, *argv, "--sparsity", 0.4, "--stream", "--save_dir", tmp_path / "out")
    assert len(counts) >= 4 and set(counts) == {1}
