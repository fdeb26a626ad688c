"""Perplexity against the library's own loss."""

import math

import pytest
import torch

from ppl_eval.ppl_dataset import eval_windows, load_eval_tokens, parse_eval_dataset
from ppl_eval.ppl_eval import perplexity, ppl_metric
from slim_utils.errors import UserError
from tests.conftest import make_tiny


def test_perplexity_is_exp_of_the_models_own_loss(samples):
    model = make_tiny("gqa")
    with torch.no_grad():
        losses = [model(sample[None], labels=sample[None]).loss for sample in samples]
    expected = math.exp(torch.stack(losses).mean())
    for batch_size in (1, 3, 8):
        assert perplexity(model, samples, batch_size) == pytest.approx(expected, rel=1e-5)


def test_windows_do_not_overlap_and_the_tail_is_dropped():
    assert eval_windows(torch.arange(11), 4, "x").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UserError, match="x: 3 tokens are less than one window of 4"):
        eval_windows(torch.arange(3), 4, "x")


def test_ppl_metric_on_a_file(tokenizer, text_file):
    model = make_tiny("gqa")
    results = ppl_metric(model, tokenizer, [f"mine={text_file}", str(text_file)], seq_len=32, batch_size=8)
    assert set(results) == {"mine", text_file.name}
    windows = eval_windows(load_eval_tokens(str(text_file), tokenizer), 32, "x")
    assert results["mine"] == results[text_file.name] == perplexity(model, windows)


def test_an_overflowing_model_has_infinite_perplexity(samples):
    model = make_tiny("gqa")
    model.lm_head.weight.data.mul_(1e6)
    assert perplexity(model, samples) == math.inf


@pytest.mark.parametrize("spec", ["wikitext3", "ptb=none.txt", "none.txt"])
def test_unknown_data_set(spec):
    with pytest.raises(UserError, match=f"--eval_datasets {spec}: neither one of wikitext2, ptb"):
        parse_eval_dataset(spec)
