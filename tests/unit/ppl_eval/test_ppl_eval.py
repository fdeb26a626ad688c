"""Evaluation texts, and perplexity against the loss of the model."""

import math
import weakref
from pathlib import Path

import pytest
import torch

from ppl_eval.ppl_dataset import (
    EvalKey,
    eval_windows,
    load_eval_sets,
    load_eval_tokens,
    name_eval_sets,
    parse_eval_dataset,
    split_eval_specs,
)
from ppl_eval.ppl_eval import perplexity, ppl_metric
from slim_utils.common.errors import UserError
from tests.conftest import random_text
from tests.tiny_models import make_tiny


def test_perplexity_is_exp_of_the_mean_loss_of_the_model(samples):
    model = make_tiny("gqa")
    with torch.no_grad():
        losses = [model(sample[None], labels=sample[None]).loss for sample in samples]
    expected = math.exp(torch.stack(losses).mean())
    for batch_size in (1, 3, 8):
        assert perplexity(model, samples, batch_size) == pytest.approx(expected, rel=1e-5)


def test_eval_windows_do_not_overlap_and_drop_the_tail():
    assert eval_windows(torch.arange(11), 4, "x").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UserError, match="x: 3 tokens are fewer than one window of 4"):
        eval_windows(torch.arange(3), 4, "x")


def test_ppl_metric_of_a_file_is_that_of_its_windows(tokenizer, text_file):
    model = make_tiny("gqa")
    results = ppl_metric(model, tokenizer, [f"mine={text_file}", str(text_file)], seq_len=32, batch_size=8)
    assert set(results) == {"mine", text_file.name}
    windows = eval_windows(load_eval_tokens(str(text_file), tokenizer), 32, "x")
    assert results["mine"] == results[text_file.name] == perplexity(model, windows)


def test_perplexity_of_an_overflowing_model_is_infinite(samples):
    model = make_tiny("gqa")
    model.lm_head.weight.data.mul_(1e6)
    assert perplexity(model, samples) == math.inf


@pytest.mark.parametrize("spec", ["wikitext3", "ptb=none.txt", "none.txt"])
def test_parse_eval_dataset_of_an_unknown_name_is_refused(spec):
    with pytest.raises(UserError, match=f"--eval_datasets {spec}: neither one of wikitext2, ptb"):
        parse_eval_dataset(spec)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Texts with equal names in oddly named folders; the working directory is their parent."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/x/t.txt", "b/x/t.txt", "lr=0.1/u.txt", "a,b/v, w.txt", "c/wikitext2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(random_text(40, len(name)))
    return tmp_path


def test_parse_eval_dataset_of_a_file_with_an_equals_sign_prefers_the_file(files):
    assert parse_eval_dataset("lr=0.1/u.txt") == ("u.txt", Path("lr=0.1/u.txt"))
    assert parse_eval_dataset("mine=lr=0.1/u.txt") == ("mine", Path("lr=0.1/u.txt"))
    with pytest.raises(UserError, match="neither one of"):
        parse_eval_dataset("x" * 5000)


def test_name_eval_sets_of_equal_file_names_adds_folders(files):
    specs = ["a/x/t.txt", str(files / "b/x/t.txt"), "lr=0.1/u.txt", "c/wikitext2", "ptb"]
    names = ["a/x/t.txt", "b/x/t.txt", "u.txt", "c/wikitext2", "ptb"]
    assert name_eval_sets(specs) == dict(zip(names, specs, strict=True))
    (files / "x").mkdir()
    (files / "x/t.txt").touch()
    inside = list(name_eval_sets(["x/t.txt", "a/x/t.txt"]))
    assert inside == [f"{files.name}/x/t.txt", "a/x/t.txt"]
    assert list(name_eval_sets(["x=a/x/t.txt", "b/x/t.txt"])) == ["x", "t.txt"]
    assert list(name_eval_sets(["t.txt=a/x/t.txt", "b/x/t.txt"])) == ["t.txt", "x/t.txt"]


@pytest.mark.parametrize(
    ("specs", "name"),
    [
        (["ptb", "ptb"], "ptb"),
        (["ptb", "ptb=a/x/t.txt"], "ptb"),
        (["mine=a/x/t.txt", "mine=b/x/t.txt"], "mine"),
        (["a/x/t.txt", "a/../a/x/t.txt"], "t.txt"),
    ],
)
def test_name_eval_sets_of_a_repeated_name_is_refused(files, specs, name):
    with pytest.raises(UserError, match=f"--extra_val_set: {name} is given twice; leave one out.* NAME=FILE"):
        name_eval_sets(specs, "--extra_val_set")


def test_load_eval_sets_of_equal_file_names_has_both(files, tokenizer):
    sets = load_eval_sets(["a/x/t.txt", "b/x/t.txt"], tokenizer, [16], 64)
    assert list(sets) == [EvalKey("a/x/t.txt", 16), EvalKey("b/x/t.txt", 16)]
    model = make_tiny("gqa")
    assert list(ppl_metric(model, tokenizer, ["a/x/t.txt", "b/x/t.txt"], 16)) == ["a/x/t.txt", "b/x/t.txt"]


def test_load_eval_sets_of_a_bad_length_names_its_flag(files, tokenizer):
    flags = {65: "--extra_val_seqlen", 50: "--extra_val_seqlen"}
    for flag, seqlen_flags in (("--extra_val_seqlen", flags), ("--eval_seqlens", {})):
        with pytest.raises(UserError, match=f"^{flag} 65: the model has 64 positions"):
            load_eval_sets(["u=a/x/t.txt"], tokenizer, [65], 64, seqlen_flags=seqlen_flags)
        with pytest.raises(UserError, match=rf"one window of 50 \({flag}\)"):
            load_eval_sets(["u=a/x/t.txt"], tokenizer, [50], 64, seqlen_flags=seqlen_flags)


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("wikitext2, ptb", ["wikitext2", "ptb"]),
        ("a,b/v, w.txt", ["a,b/v, w.txt"]),
        ("ptb,mine=a,b/v, w.txt , a/x/t.txt", ["ptb", "mine=a,b/v, w.txt", "a/x/t.txt"]),
        ("none", []),
        (" ,", []),
    ],
)
def test_split_eval_specs_keeps_existing_files_with_commas(files, text, specs):
    assert split_eval_specs(text) == specs


def test_perplexity_frees_the_logits_of_a_batch_before_the_next_one(samples, monkeypatch):
    model, logits = make_tiny("llama").eval(), []
    forward = model.forward

    def watched(*args, **kwargs):
        assert not any(earlier() is not None for earlier in logits)
        output = forward(*args, **kwargs)
        logits.append(weakref.ref(output.logits))
        return output

    monkeypatch.setattr(model, "forward", watched)
    perplexity(model, samples, batch_size=2)
    assert len(logits) == 4
