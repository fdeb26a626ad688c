"""``model_finetune.py`` run as a user runs it."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppl_eval.ppl_eval import ppl_metric
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model
from slim_utils.families import find_family
from slim_utils.masks import read_pruning
from slim_utils.params_remove import shrink
from tests.integration.finetuning import logits, losses, main, run
from tests.processes import run_python, run_ranks
from tests.tiny_models import make_tiny
from tests.unit.train_utils.test_sparse_trainer import removed_weights
from train_utils import finetune_result, sparse_trainer
from train_utils.finetune_args import parse_args


def test_model_finetune_with_lora_of_a_pruned_model_fuses_the_adapters(slim, argv, tmp_path, samples, capsys):
    base, out = slim / "pruned_weights", tmp_path / "out"
    main(argv(base, "--use_lora", "true", "--is_mask_training", "false"))
    assert "perplexity wikitext2, seqlen 16" in capsys.readouterr().out
    fused = out / "lora_fused_model"
    assert {path.name for path in base.iterdir()} == {path.name for path in fused.iterdir()}
    assert json.loads((base / "config.json").read_text()) == json.loads((fused / "config.json").read_text())
    assert (base / "pruning.json").read_text() == (fused / "pruning.json").read_text()

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    with torch.no_grad():
        expected = adapted(input_ids=samples).logits
    assert (logits(fused, samples) - expected).abs().max() < 1e-4
    assert (logits(base, samples) - expected).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(fused).chat_template == AutoTokenizer.from_pretrained(base).chat_template

    record = json.loads((out / "run.json").read_text())
    assert record["finished"] is True
    assert {entry["seqlen"] for entry in record["perplexity"]["after"]} == {16, 32}
    before, after = (entry[0]["perplexity"] for entry in record["perplexity"].values())
    assert before != after
    assert record["arguments"]["optim"] == "adamw_torch"
    watched = [entry for entry in record["log"] if "eval_wikitext2_loss" in entry]
    assert watched and any("eval_validation_loss" in entry for entry in record["log"])
    assert not list(tmp_path.glob(".*"))


def test_model_finetune_of_all_weights_in_bf16_measures_the_model_that_it_saves(slim, argv, tmp_path, tokenizer):
    main(argv(slim / "pruned_weights", "--bf16", "true", "--max_steps", 1))
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    text = Path(next(argument for argument in argv(out) if argument.startswith("wikitext2=")).partition("=")[2])
    for entry in record["perplexity"]["after"]:
        saved = ppl_metric(load_model(str(out), "auto", False), tokenizer, [f"text={text}"], entry["seqlen"])
        assert entry["perplexity"] == pytest.approx(saved["text"], rel=1e-6)


def test_fused_model_loads_without_the_repository(slim, argv, tmp_path):
    main(argv(slim / "pruned_weights", "--use_lora", "true"))
    code = (
        "import sys; from transformers import AutoModelForCausalLM;"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    process = run_python("-c", code, tmp_path / "out" / "lora_fused_model", cwd=tmp_path)
    assert process.stdout.strip() == "SlimLlamaForCausalLM"


@pytest.mark.parametrize("lora", ["true", "false"])
def test_mask_training_keeps_zeros_at_every_step(slim, argv, tmp_path, samples, monkeypatch, lora):
    family, masks = None, read_pruning(slim / "pruning.json")
    steps = []

    class Watching(sparse_trainer.MaskCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            # Before the slices are zeroed.
            steps.append(self.nonzeros())
            super().on_optimizer_step()

    monkeypatch.setattr(sparse_trainer, "MaskCallback", Watching)
    main(argv(slim, "--use_lora", lora, "--is_mask_training", "true", "--weight_decay", 0.2))
    assert steps == [0] * 5
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert (record["mask"]["nonzero_after_training"], record["mask"]["moved_by_optimizer"]) == (0, 0)

    trained_dir = out / "lora_fused_model" if lora == "true" else out
    trained = AutoModelForCausalLM.from_pretrained(trained_dir).eval()
    assert all(not weights.any() for weights in removed_weights(trained, masks))
    assert read_pruning(trained_dir / "pruning.json") == masks
    family = find_family(trained.config)
    expected = logits(trained_dir, samples)
    with torch.no_grad():
        assert (shrink(trained, family, masks)(samples).logits - expected).abs().max() < 1e-4
    assert (logits(trained_dir / "pruned_weights", samples) - expected).abs().max() < 1e-4
    assert (logits(slim, samples) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("lora", ["true", "false"])
def test_mask_training_of_a_dense_base_saves_a_masked_model(slim, checkpoint, argv, tmp_path, caplog, lora):
    flags = ["--use_lora", lora, "--is_mask_training", "true", "--mask_config_dir", slim]
    with caplog.at_level("WARNING"):
        main(argv(checkpoint, *flags))
    masks, out = read_pruning(slim / "pruning.json"), tmp_path / "out"
    trained = AutoModelForCausalLM.from_pretrained(out / "lora_fused_model" if lora == "true" else out)
    removed = list(removed_weights(trained, masks))
    assert all(not weights.any() for weights in removed)
    record = json.loads((out / "run.json").read_text())
    assert record["mask"]["nonzero_after_training"] == 0
    total = sum(weights.numel() for weights in removed)
    assert f"{total} of {total} weights that the masks remove are not zero in {checkpoint}" in caplog.text


def test_mask_record_counts_nonzeros_of_the_saved_model(slim, argv, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_result, "zero_removed", lambda *args: None)
    base = tmp_path / "base"
    make_tiny("gqa").save_pretrained(base)
    AutoTokenizer.from_pretrained(slim).save_pretrained(base)
    main(argv(base, "--use_lora", "true", "--is_mask_training", "true", "--mask_config_dir", slim))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["mask"]["nonzero_after_training"] == record["mask"]["masked_weights"] > 0


def test_mask_training_with_masks_in_the_originals_format_keeps_them(slim, argv, tmp_path):
    masks = read_pruning(slim / "pruning.json")
    original = {}
    for index, mask in enumerate(masks):
        removed = mask.removed_units()
        original[f"model.layers.{index}.self_attn.o_proj.weight"] = removed["heads"]
        original[f"model.layers.{index}.mlp.down_proj.weight"] = removed["columns"]
    file = tmp_path / "mask.json"
    file.write_text(json.dumps(original))
    main(argv(slim, "--is_mask_training", "true", "--mask_config_dir", file))
    assert read_pruning(tmp_path / "out" / "pruning.json") == masks

    original["model.layers.1.self_attn.o_proj.weight"] = [0]
    file.write_text(json.dumps(original))
    with pytest.raises(UserError, match=r"layer 1: removing heads \[0\] leaves kv heads with different numbers"):
        main(argv(slim, "--is_mask_training", "true", "--mask_config_dir", file, "--overwrite", "true"))
    original["model.layers.1.self_attn.o_proj.weight"] = [6]
    file.write_text(json.dumps(original))
    with pytest.raises(UserError, match=r"o_proj\.weight is not a list of indices below 6"):
        main(argv(slim, "--is_mask_training", "true", "--mask_config_dir", file, "--overwrite", "true"))


@pytest.mark.parametrize(
    ("mask", "distilled"),
    [("true", False), pytest.param("false", False, marks=pytest.mark.slow), ("false", True)],
)
def test_model_finetune_resumed_continues_the_same_loss_curve(slim, argv, tmp_path, checkpoint, mask, distilled):
    flags = ["--use_lora", "true", "--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1]
    flags += ["--is_mask_training", mask, *(["--distill_from", checkpoint] if distilled else [])]
    model, out = slim if mask == "true" else slim / "pruned_weights", tmp_path / "out"
    main(argv(model, *flags))
    whole, weights = losses(out), load_file(out / "adapter_model.safetensors")
    # The state after a run was killed while it wrote the checkpoint of step 4.
    shutil.rmtree(out / "lora_fused_model")
    shutil.rmtree(out / "checkpoint-5")
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    (out / "adapter_model.safetensors").unlink()

    main(argv(model, *flags, "--resume_from_checkpoint", "true"))
    assert losses(out) == pytest.approx(whole, rel=1e-6)
    again = load_file(out / "adapter_model.safetensors")
    assert all(torch.allclose(again[name], weights[name], atol=1e-7) for name in weights)
    assert (out / "lora_fused_model" / "model.safetensors").is_file()


def test_model_finetune_with_focal_loss_lowers_the_loss_values(slim, argv, tmp_path):
    main(argv(slim / "pruned_weights", "--use_lora", "true"))
    plain = losses(tmp_path / "out")
    main(argv(slim / "pruned_weights", "--use_lora", "true", "--use_focal_loss", "true", "--overwrite", "true"))
    focal = losses(tmp_path / "out")
    assert 0 < focal[1] < plain[1]


def test_model_finetune_with_messages_and_conversations_trains_on_their_answers(slim, argv, tmp_path, caplog):
    base = tmp_path / "base"
    shutil.copytree(slim / "pruned_weights", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w10' if m.role == 'user' else 'w11' }} {{ m.content }} </s> {% endfor %}"
        "{{ 'w11' if add_generation_prompt }}"
    )
    tokenizer.save_pretrained(base)
    turns = [("user", "w3 w4"), ("assistant", "w5"), ("user", "w6"), ("assistant", "w7 w8")]
    messages = [{"role": role, "content": content} for role, content in turns]
    names = {"user": "human", "assistant": "gpt"}
    conversation = [{"from": names[role], "value": content} for role, content in turns]
    file = tmp_path / "chat.jsonl"
    rows = [{"messages": messages}, {"conversations": conversation}, {"messages": messages[:1]}] * 8
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data_path", file, "--cache_dataset", "true", "--cache_dir", tmp_path / "cache"]
    flags += ["--num_train_epochs", 20, "--learning_rate", 5e-2]
    with caplog.at_level("INFO"):
        main(argv(base, *flags))
    assert "24 of 24 rows are conversations: they use the tokenizer's chat template" in caplog.text
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["data"]["train_samples"], record["data"]["dropped_rows"]) == (8, 8)
    loss = losses(tmp_path / "out")
    assert loss[max(loss)] < 0.5 * loss[1]
    # The answers, with the ends of their turns, are learned.
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(prompt + " w7 w8 </s>").input_ids])
    predictions = logits(tmp_path / "out", ids).argmax(-1)
    assert predictions[0, -4:-1].tolist() == ids[0, -3:].tolist()


def test_model_finetune_with_the_originals_recipe_on_two_processes_runs(slim, argv, tmp_path):
    flags = ["--use_lora", "true", "--bf16", "true", "--is_mask_training", "true"]
    process = run_ranks(2, "model_finetune.py", *argv(slim, *flags))
    assert process.returncode == 0, process.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["processes"] == 2
    assert record["mask"]["nonzero_after_training"] == record["mask"]["moved_by_optimizer"] == 0
    assert process.stderr.count("saved") == 1
    # Both processes train: 40 samples, 2 × 4 × 2 per step.
    assert max(losses(tmp_path / "out")) <= 3 <= record["mask"]["optimizer_steps"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "distilled"), [(1, False), (2, False), (2, True)])
def test_model_finetune_with_deepspeed_zero_2_keeps_zeros(slim, argv, tmp_path, checkpoint, processes, distilled):
    """Compiles an extension in the first run, which takes about two minutes."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--master_port=29714", f"--nproc_per_node={processes}"]
    flags = ["--deepspeed", "configs/deepspeed.json", "--bf16", "true", "--is_mask_training", "true"]
    flags += ["--distill_from", checkpoint] if distilled else []
    start = time.perf_counter()
    process = run(argv(slim, *flags, "--weight_decay", 0.2), *launcher)
    assert process.returncode == 0, process.stderr
    assert time.perf_counter() - start < 300
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["processes"] == processes
    assert record["mask"]["nonzero_after_training"] == record["mask"]["moved_by_optimizer"] == 0
    assert "deepspeed" in record["versions"]


def test_parse_args_without_deepspeed_sets_no_rank(slim, argv):
    parse_args(argv(slim))
    assert "RANK" not in os.environ
