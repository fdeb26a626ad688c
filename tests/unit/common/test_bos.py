"""Windows of text with and without a BOS."""

import copy

import pytest
import torch

from ppl_eval.ppl_dataset import EvalKey, eval_windows, load_eval_sets
from ppl_eval.ppl_eval import evaluate
from slim_utils.common.bos import BOS_POLICIES, calibration_bos, evaluation_bos
from slim_utils.common.errors import UserError
from tests.conftest import adding_bos, word_tokenizer
from tests.tiny_models import make_tiny


def test_eval_windows_with_bos_start_with_it_and_keep_all_text():
    windows = eval_windows(torch.arange(11), 4, "x", bos=99)
    assert windows.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    with pytest.raises(UserError, match="2 tokens are fewer than one window of 4"):
        eval_windows(torch.arange(2), 4, "x", bos=99)


def test_load_eval_sets_of_a_tokenizer_that_adds_bos_follow_the_policy(bos_tokenizer, text_file):
    sets = {policy: load_eval_sets([str(text_file)], bos_tokenizer, [16], 64, policy) for policy in BOS_POLICIES}
    assert [list(eval_sets) for eval_sets in sets.values()] == [
        [EvalKey(text_file.name, 16, True)],
        [EvalKey(text_file.name, 16, True)],
        [EvalKey(text_file.name, 16, False)],
    ]
    (with_bos,), (without,) = sets["auto"].values(), sets["never"].values()
    assert with_bos[:, 0].tolist() == [bos_tokenizer.bos_token_id] * len(with_bos)
    assert (with_bos[:, 1:] != bos_tokenizer.bos_token_id).all()
    # As in the published tables: the tokenizer adds its BOS once, before the whole text.
    assert without[0, 0] == bos_tokenizer.bos_token_id
    assert (without.flatten()[1:] != bos_tokenizer.bos_token_id).all()
    assert torch.equal(without.flatten()[1:16], with_bos[0, 1:])


def test_load_eval_sets_of_llama_2_on_auto_measures_without_bos_first(text_file):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 29871)}, "▁": 29871}
    tokenizer = adding_bos(word_tokenizer(vocabulary))
    assert list(load_eval_sets([str(text_file)], tokenizer, [16], 64)) == [
        EvalKey(text_file.name, 16, False),
        EvalKey(text_file.name, 16, True),
    ]
    assert evaluation_bos(tokenizer, "always") == [1]
    assert evaluation_bos(tokenizer, "never") == [None]
    assert calibration_bos(tokenizer, "auto") == 1


def test_load_eval_sets_with_bos_always_without_a_bos_token_is_refused(tokenizer, text_file):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    with pytest.raises(UserError, match="--bos always: the tokenizer has no BOS token"):
        load_eval_sets([str(text_file)], bare, [16], 64, "always")
    assert calibration_bos(bare, "auto") is None


def test_evaluate_logs_whether_windows_have_a_bos(bos_tokenizer, text_file, caplog):
    caplog.set_level("INFO")
    sets = load_eval_sets([f"mine={text_file}"], bos_tokenizer, [16], 64)
    (entry,) = evaluate(make_tiny("gqa"), sets)
    assert entry["bos"] is True
    assert "with BOS" in caplog.text
    assert next(iter(sets)).label == "mine, seqlen 16, BOS"
