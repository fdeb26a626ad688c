"""Instruction rows become samples whose targets are the answer."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from slim_utils.common.errors import UserError
from train_utils import finetune_dataset
from train_utils.finetune_dataset import (
    IGNORED_LABEL,
    SampleSettings,
    encode,
    load_finetune_data,
    training_rows,
    window_dataset,
)
from train_utils.prompts import TEMPLATES, check_tokenizer

ROW = {"instruction": "w3 w4", "input": "", "output": "w5 w6 w7"}
WITH_INPUT = {**ROW, "input": "w9"}
NONE = SampleSettings("none", 32)


def test_encode_masks_the_prompt_and_not_the_answer(tokenizer):
    sample = encode(ROW, tokenizer, NONE)
    assert sample["input_ids"] == [3, 4, 5, 6, 7, tokenizer.eos_token_id]
    assert sample["labels"] == [IGNORED_LABEL] * 2 + [5, 6, 7, tokenizer.eos_token_id]
    assert sample["attention_mask"] == [1] * 6
    assert encode(WITH_INPUT, tokenizer, NONE)["labels"][:4] == [IGNORED_LABEL] * 3 + [5]


def test_encode_with_train_full_prompt_masks_nothing(tokenizer):
    sample = encode(ROW, tokenizer, SampleSettings("none", 32, train_full_prompt=True))
    assert sample["labels"] == sample["input_ids"]


@pytest.mark.parametrize(
    ("length", "ids"),
    [(6, [3, 4, 5, 6, 7, 2]), (5, [3, 4, 5, 6, 7]), (3, [3, 4, 5]), (2, None), (1, None)],
)
def test_encode_of_a_truncated_sample_has_no_eos_and_without_answer_is_dropped(tokenizer, length, ids):
    sample = encode(ROW, tokenizer, SampleSettings("none", length))
    assert (sample and sample["input_ids"]) == ids
    if sample:
        assert any(label != IGNORED_LABEL for label in sample["labels"][1:])


def test_encode_adds_the_special_tokens_of_the_tokenizer(tokenizer, monkeypatch):
    """A tokenizer that adds BOS and EOS gives each once."""

    class Wrapped:
        eos_token_id = 2

        def __call__(self, text, add_special_tokens, **kwargs):
            result = tokenizer(text, add_special_tokens=False)
            if add_special_tokens:
                result["input_ids"] = [1, *result["input_ids"], 2]
            return result

    assert encode(ROW, Wrapped(), NONE)["input_ids"] == [1, 3, 4, 5, 6, 7, 2]
    assert encode(ROW, Wrapped(), NONE)["labels"][:4] == [IGNORED_LABEL] * 3 + [5]


def test_encode_of_an_answer_merged_into_the_prompt_masks_no_answer_token():
    """A tokenizer that reads pairs of characters: prompt 'abc', answer 'de' is ab|cd|e, the prompt alone ab|c."""

    class Pairs:
        eos_token_id = 0

        def __call__(self, text, **kwargs):
            pairs = (text[i : i + 2] for i in range(0, len(text), 2))
            return SimpleNamespace(input_ids=[1000 * ord(pair[0]) + ord(pair[1:] or "\0") for pair in pairs])

    settings = SampleSettings("none", 32)
    sample = encode({"instruction": "ab", "input": "", "output": "de"}, Pairs(), settings)
    # The prompt is "ab\n": its second token would be "\n" alone, together it is "\nd".
    assert sample["labels"] == [IGNORED_LABEL, *sample["input_ids"][1:]]


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template])
def test_templates_contain_instruction_and_input_once(name):
    with_input = TEMPLATES[name].prompt("{do} this", "with that")
    assert with_input.count("{do} this") == 1
    assert with_input.count("with that") == 1
    assert "with that" not in TEMPLATES[name].prompt("{do} this", "")


def test_template_alpaca_is_the_published_prompt():
    assert TEMPLATES["alpaca"].prompt("A", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nA\n\n### Response:\n"
    )


def test_encode_with_chat_uses_the_template_of_the_tokenizer(tokenizer):
    tokenizer.chat_template, kept = (
        "{% for m in messages %}{% if m.role == 'user' %}w10 {{ m.content }} w11 {% else %}w12 {{ m.content }} w13"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}w12{% endif %}",
        tokenizer.chat_template,
    )
    try:
        sample = encode(WITH_INPUT, tokenizer, SampleSettings("chat", 32))
    finally:
        tokenizer.chat_template = kept
    assert sample["input_ids"] == [10, 3, 4, 9, 11, 12, 5, 6, 7, 13]
    assert sample["labels"] == [IGNORED_LABEL] * 6 + [5, 6, 7, 13]


def test_encode_with_chat_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    try:
        with pytest.raises(UserError, match="the tokenizer has no chat template"):
            encode(ROW, tokenizer, SampleSettings("chat", 32))
    finally:
        tokenizer.chat_template = kept


def test_load_finetune_data_counts_dropped_rows_and_splits_deterministically(tokenizer, instruction_file, caplog):
    settings = SampleSettings("none", 8)
    first, again = (load_finetune_data("x", str(instruction_file), tokenizer, settings, 8, None) for _ in range(2))
    rows = training_rows(str(instruction_file))
    expected = sum(len((row["instruction"] + " " + row["input"]).split()) >= 8 for row in rows)
    assert first.num_dropped == expected > 0
    assert f"{expected} of 48 rows dropped" in caplog.text
    assert len(first.validation) == 8
    assert len(first.train) + 8 + expected == 48
    assert first.validation[:] == again.validation[:]
    held_out = {tuple(ids) for ids in first.validation["input_ids"]}
    assert not held_out & {tuple(ids) for ids in first.train["input_ids"]}


def test_load_finetune_data_caches_by_data_tokenizer_and_settings(tokenizer, instruction_file, tmp_path, monkeypatch):
    def load(settings=NONE, file=instruction_file):
        return load_finetune_data("x", str(file), tokenizer, settings, 4, tmp_path / "cache")

    first = load()
    other = tmp_path / "other.jsonl"
    other.write_text(instruction_file.read_text().replace("w5", "w6"))
    tokenizer.chat_template, kept = "other", tokenizer.chat_template
    changed = [load(), load(SampleSettings("none", 31))]
    tokenizer.chat_template = kept
    changed.append(load(file=other))
    assert len({data.sha256 for data in [first, *changed]}) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert not list((tmp_path / "cache").rglob("*.pkl"))
    monkeypatch.setattr(finetune_dataset, "encode", None)
    assert load().train[:] == first.train[:]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "row 0: needs the columns instruction and output, messages, or conversations, but has: text"),
        ({"instruction": "a", "output": None}, "row 0: output is NoneType, not text"),
        ({"instruction": 3, "output": "a"}, "row 0: instruction is int, not text"),
        ({"instruction": "a", "output": ["b"]}, "row 0: output is list, not text"),
        ({"instruction": "a", "input": 0, "output": "b"}, "row 0: input is int, not text"),
    ],
)
def test_training_rows_of_a_bad_row_is_refused(tmp_path, row, message):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(UserError, match=message):
        training_rows(str(path))


def test_training_rows_of_csv_are_read(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('\ufeffinstruction,input,output\n"w3, w4",,2020\n', encoding="utf-8")
    assert training_rows(str(path)) == [{"instruction": "w3, w4", "input": "", "output": "2020"}]


def test_load_finetune_data_from_a_damaged_cache_names_it(tokenizer, instruction_file, tmp_path):
    load_finetune_data("x", str(instruction_file), tokenizer, NONE, 4, tmp_path)
    (folder,) = tmp_path.iterdir()
    for damage in ("[", None):
        for path in folder.glob("*.json"):
            path.write_text(damage) if damage else path.unlink()
        with pytest.raises(UserError, match=f"the tokenised samples cached in {folder} cannot be read .*; remove this"):
            load_finetune_data("x", str(instruction_file), tokenizer, NONE, 4, tmp_path)


def test_load_finetune_data_with_empty_answers_logs_the_reason(tokenizer, tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    rows = [ROW] * 4 + [{**ROW, "output": ""}, {**ROW, "output": " \n"}, {**ROW, "instruction": "w3 " * 40}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_finetune_data("x", str(path), tokenizer, NONE, 1, tmp_path / "cache")
    assert data.num_dropped == 3
    assert len(data.train) == 3
    assert "2 of 7 rows dropped: empty answer" in caplog.text
    assert "1 of 7 rows dropped: no answer token within --max_length 32" in caplog.text
    caplog.clear()
    assert load_finetune_data("x", str(path), tokenizer, NONE, 1, tmp_path / "cache").num_dropped == 3
    assert "2 of 7 rows dropped: empty answer" in caplog.text


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{**ROW, "output": ""}] * 3, NONE, "no sample is left of 3 rows: 3 have an empty answer$"),
        (
            [ROW, {**ROW, "output": ""}],
            SampleSettings("none", 2),
            "of 2 rows: 1 has an empty answer, 1 has no token of its answer within --max_length 2$",
        ),
        ([], NONE, "no sample is left of 0 rows$"),
    ],
)
def test_load_finetune_data_without_samples_names_the_reason(tokenizer, tmp_path, rows, settings, message):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        load_finetune_data("x", str(path), tokenizer, settings, 0, None)


def test_load_finetune_data_with_an_unwritable_cache_warns(tokenizer, instruction_file, caplog):
    data = load_finetune_data("x", str(instruction_file), tokenizer, NONE, 4, instruction_file / "slimgpt")
    assert len(data.train) == 44
    assert "the tokenised samples are not cached" in caplog.text
    assert "--cache_dir" in caplog.text


def test_load_finetune_data_of_too_few_rows_names_the_flag(tokenizer, instruction_file):
    with pytest.raises(UserError, match="48 samples, 48 of them held out; lower --val_dataset_size"):
        load_finetune_data("x", str(instruction_file), tokenizer, NONE, 48, None)
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        load_finetune_data("x", "none.json", tokenizer, NONE, 0, None)


def test_window_dataset_has_every_token_as_target():
    data = window_dataset(torch.arange(6).view(2, 3))
    assert data["labels"] == data["input_ids"] == [[0, 1, 2], [3, 4, 5]]
    assert data["attention_mask"] == [[1, 1, 1]] * 2


def specials(tokenizer, **changes):
    """A copy of ``tokenizer`` with other special tokens or another chat template."""
    changed = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


@pytest.mark.parametrize(
    ("template", "changes", "message"),
    [
        ("none", {"eos_token": None}, "the tokenizer of DIR has no end-of-sequence token.*; set eos_token in"),
        ("chat", {"eos_token": None}, "the tokenizer of DIR has no end-of-sequence token.*; set eos_token in"),
        ("chat", {"chat_template": None}, "--prompt_template_name chat: the tokenizer has no chat template"),
        (
            "chat",
            {"chat_template": "{{ raise_exception('only system\nprompts') }}"},
            "--prompt_template_name chat: the tokenizer's chat template fails .*only system prompts.*; choose alpaca",
        ),
        ("chat", {"chat_template": "{% for m in messages %}x"}, "template fails .TemplateSyntaxError.*choose alpaca"),
        ("chat", {"chat_template": "{{ messages[7].content.x }}"}, "template fails .UndefinedError.*choose alpaca"),
        ("chat", {"chat_template": "{{ 1 + 'a' }}"}, "template fails .TypeError.*choose alpaca"),
    ],
)
def test_check_tokenizer_of_an_unusable_tokenizer_is_one_line(tokenizer, template, changes, message):
    with pytest.raises(UserError, match=message) as error:
        check_tokenizer(specials(tokenizer, **changes), template, "DIR")
    assert "\n" not in str(error.value)


def test_check_tokenizer_of_a_usable_tokenizer_passes(tokenizer):
    check_tokenizer(tokenizer, "none", "DIR")
    # A chat template ends the answer itself.
    check_tokenizer(specials(tokenizer, eos_token=None, pad_token="<unk>"), "chat", "DIR")
    check_tokenizer(specials(tokenizer, bos_token=None), "alpaca", "DIR")
    check_tokenizer(specials(tokenizer, chat_template="{% broken"), "alpaca", "DIR")
