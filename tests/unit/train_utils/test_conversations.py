"""Conversations become samples whose targets are the answers."""

import json

import pandas
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slim_utils.common.errors import UserError
from train_utils.finetune_dataset import IGNORED_LABEL, SampleSettings, encode, load_finetune_data, training_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3: the reasoning of an answer is written only after the last question, empty or not.
REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% if loop.index0 > ns.last %}"
    "{{ parts[0] + '</think>' if parts|length > 1 else '<think></think>' }}{% endif %}{{ parts[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING_PROMPT = REASONING.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")
# Mistral v0.3: the system prompt is part of a question without answer.
SYSTEM_LAST = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
    "[INST] {{ ns.system if loop.last else '' }}{{ m.content }}[/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)
COUNTING = "{{ messages|length }} messages:\n" + CHATML
LAST_TURN = CHATML.replace("in messages", "in messages[-2 if messages[-1].role == 'assistant' else -1:]")
THINKING_PROMPT = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>")
END_ONCE = CHATML.replace("<|im_end|>\n", "\n") + "{% if messages[-1].role == 'assistant' %}<|im_end|>{% endif %}"

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Ask me."},
]
ALPACA = SampleSettings("alpaca", 500)


def bytes_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, except for the tokens of ChatML and two newlines, which are one token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **tokens)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return bytes_tokenizer(CHATML)


def targets(sample: dict[str, list[int]], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Texts of the runs of targets of a sample."""
    runs: list[list[int]] = [[]]
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (token, IGNORED_LABEL)
        if label == token:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def conversation_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_encode_of_two_turns_with_a_system_prompt_has_the_answers_as_targets(chatml):
    sample = encode({"messages": TURNS}, chatml, ALPACA)
    assert chatml.decode(sample["input_ids"]) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nAsk me.<|im_end|>\n"
    )
    assert targets(sample, chatml) == ["Hi.<|im_end|>\n", "Ask me.<|im_end|>\n"]
    assert sample["attention_mask"] == [1] * len(sample["input_ids"])


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (REASONING, ["Hi.<|im_end|>\n", "<think></think>Ask me.<|im_end|>\n"]),
        (REASONING_PROMPT, ["Hi.<|im_end|>\n", "</think>Ask me.<|im_end|>\n"]),
        (SYSTEM_LAST, ["Hi.<|im_end|>", "Ask me.<|im_end|>"]),
        (COUNTING, ["Hi.<|im_end|>\n", "Ask me.<|im_end|>\n"]),
        (LAST_TURN, ["Ask me.<|im_end|>\n"]),
        (THINKING_PROMPT, ["Hi.<|im_end|>\n", "Ask me.<|im_end|>\n"]),
        (END_ONCE, ["Hi.\n", "Ask me.\n<|im_end|>"]),
    ],
    ids=["reasoning", "reasoning_prompt", "system_last", "counting", "last_turn", "thinking_prompt", "end_once"],
)
def test_encode_with_a_template_that_rewrites_earlier_turns_has_only_answers_as_targets(template, answers):
    tokenizer = bytes_tokenizer(template)
    assert targets(encode({"messages": TURNS}, tokenizer, ALPACA), tokenizer) == answers


def test_encode_with_a_template_that_removes_reasoning_has_the_rest_of_the_answer_as_target():
    tokenizer = bytes_tokenizer(REASONING)
    turns = [*TURNS[:2], {"role": "assistant", "content": "<think>Who?</think>Hi."}, *TURNS[3:]]
    sample = encode({"messages": turns}, tokenizer, ALPACA)
    assert "Who?" not in tokenizer.decode(sample["input_ids"])
    assert targets(sample, tokenizer) == ["Hi.<|im_end|>\n", "<think></think>Ask me.<|im_end|>\n"]


def test_encode_of_an_answer_merged_with_the_next_turn_ends_before_the_merged_token():
    template = "{% for m in messages %}{{ '\n' if m.role == 'user' }}{{ m.content }}\n{% endfor %}"
    tokenizer = bytes_tokenizer(template)
    sample = encode({"messages": TURNS}, tokenizer, ALPACA)
    assert tokenizer.decode(sample["input_ids"]) == "Be short.\n\nHello?\nHi.\n\nWhy?\nAsk me.\n"
    assert targets(sample, tokenizer) == ["Hi.", "Ask me.\n"]


def test_encode_of_a_conversation_that_an_assistant_starts_has_its_answers_as_targets(chatml):
    sample = encode({"messages": TURNS[2:]}, chatml, ALPACA)
    assert targets(sample, chatml) == ["Hi.<|im_end|>\n", "Ask me.<|im_end|>\n"]


def test_encode_of_turns_without_an_answer_has_no_target_in_them(chatml):
    blank = {"role": "assistant", "content": " "}
    turns = [*TURNS, {"role": "tool", "content": "3"}, blank, TURNS[1]]
    sample = encode({"messages": turns}, chatml, ALPACA)
    assert targets(sample, chatml) == ["Hi.<|im_end|>\n", "Ask me.<|im_end|>\n"]
    assert chatml.decode(sample["input_ids"]).endswith(
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n <|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
    )


def test_encode_truncated_in_the_second_answer_keeps_its_beginning(chatml):
    whole = encode({"messages": TURNS}, chatml, ALPACA)
    length = len(whole["input_ids"]) - 5
    sample = encode({"messages": TURNS}, chatml, SampleSettings("alpaca", length))
    assert sample == {name: values[:length] for name, values in whole.items()}
    assert targets(sample, chatml) == ["Hi.<|im_end|>\n", "Ask "]


def test_encode_truncated_before_the_first_answer_is_dropped(chatml):
    labels = encode({"messages": TURNS}, chatml, ALPACA)["labels"]
    first_target = next(index for index, label in enumerate(labels) if label != IGNORED_LABEL)
    for train_full_prompt in (False, True):
        settings = SampleSettings("alpaca", first_target, train_full_prompt)
        assert encode({"messages": TURNS}, chatml, settings) is None
    one_more = encode({"messages": TURNS}, chatml, SampleSettings("alpaca", first_target + 1))
    assert targets(one_more, chatml) == ["H"]


def test_encode_of_a_conversation_with_train_full_prompt_masks_nothing(chatml):
    sample = encode({"messages": TURNS}, chatml, SampleSettings("alpaca", 500, train_full_prompt=True))
    assert sample["labels"] == sample["input_ids"]


@pytest.mark.parametrize("template", [CHATML, REASONING, SYSTEM_LAST, THINKING_PROMPT])
@pytest.mark.parametrize("context", ["", "Two."])
def test_encode_of_an_instruction_with_chat_equals_the_same_messages(template, context):
    tokenizer = bytes_tokenizer(template)
    instruction = {"instruction": "Count.", "input": context, "output": "One."}
    question = {"role": "user", "content": "Count.\nTwo." if context else "Count."}
    messages = [question, {"role": "assistant", "content": "One."}]
    sample = encode(instruction, tokenizer, SampleSettings("chat", 500))
    assert sample == encode({"messages": messages}, tokenizer, ALPACA)
    (answer,) = targets(sample, tokenizer)
    assert "One.<|im_end|>" in answer and "Count." not in answer


def test_training_rows_of_sharegpt_equal_those_of_messages(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    rows = [{"messages": TURNS}, {"id": "a", "conversations": sharegpt}, {"conversations": TURNS}]
    path = conversation_file(tmp_path / "data.jsonl", rows)
    assert training_rows(path) == [{"messages": TURNS}] * 3


def test_training_rows_of_parts_and_null_are_texts(tmp_path):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    rows = [{"messages": [{"role": "system", "content": None}, {"role": "user", "content": parts}, TURNS[2]]}]
    path = conversation_file(tmp_path / "data.jsonl", rows)
    assert training_rows(path) == [{"messages": [{"role": "system", "content": ""}, TURNS[1], TURNS[2]]}]


def test_training_rows_of_mixed_parquet_are_each_of_their_kind(tmp_path):
    """Parquet fills the columns and keys that a row lacks with null."""
    sharegpt = [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"instruction": "c", "output": "d"}, {"messages": TURNS}, {"conversations": sharegpt}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    assert training_rows(str(tmp_path / "data.parquet")) == [
        {"instruction": "c", "input": "", "output": "d"},
        {"messages": TURNS},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hello?"}, "messages is str, not a list of messages"),
        ({"conversations": {"from": []}}, "conversations is dict, not a list of messages"),
        ({"messages": None}, "messages is NoneType, not a list of messages"),
        ({"messages": [TURNS[0], "Hello?"]}, "message 1: str, not an object with role and content"),
        ({"messages": [{"role": "user"}]}, "message 0: needs role and content, or from and value, but has: role"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 0: unknown role 'bot'; choose one of system, user,"),
        ({"messages": [{"role": 3, "content": "a"}]}, "message 0: unknown role 3; "),
        ({"conversations": [{"from": "observation", "value": "a"}]}, "message 0: unknown role 'observation'; "),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0: content is int, not text"),
        ({"conversations": [{"from": "gpt", "value": {}}]}, "message 0: value is dict, not text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, r"message 0: content is not text \(a lone surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]},
            "message 0: content has a part of type 'image', not a text",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "message 0: content has a part of type 'str', not a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]},
            r"message 0: text is not text \(a lone surrogate",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]},
            "message 0: tool_calls are not supported; write the calls into the content",
        ),
    ],
)
def test_training_rows_of_a_bad_conversation_is_refused(tmp_path, row, message):
    path = conversation_file(tmp_path / "data.jsonl", [{"messages": TURNS}, row])
    with pytest.raises(UserError, match=rf"data\.jsonl: row 1: {message}") as error:
        training_rows(path)
    assert "\n" not in str(error.value)


def test_load_finetune_data_of_mixed_rows_uses_the_template_of_each_and_counts_dropped(chatml, tmp_path, caplog):
    instruction = {"instruction": "Count.", "input": "", "output": "One."}
    unanswered = [{"messages": TURNS[:2]}, {"messages": []}, {"messages": [TURNS[1], {**TURNS[2], "content": "\n"}]}]
    long = {"messages": [{"role": "user", "content": "a" * 500}, TURNS[2]]}
    rows = [instruction, *unanswered, {"messages": TURNS}, long]
    path = conversation_file(tmp_path / "data.jsonl", rows)
    with caplog.at_level("INFO"):
        data = load_finetune_data("x", path, chatml, ALPACA, 0, None)
    assert [targets(sample, chatml) for sample in data.train] == [
        ["One.<|im_end|>"],
        ["Hi.<|im_end|>\n", "Ask me.<|im_end|>\n"],
    ]
    assert "### Instruction:\nCount." in chatml.decode(data.train[0]["input_ids"])
    assert data.num_dropped == 4
    assert "3 of 6 rows dropped: empty answer" in caplog.text
    assert "1 of 6 rows dropped: no answer token within --max_length 500" in caplog.text
    note = "5 of 6 rows are conversations: they use the tokenizer's chat template, not --prompt_template_name alpaca"
    assert caplog.text.count(note) == 1


def test_load_finetune_data_of_conversations_with_chat_or_of_instructions_logs_no_template(chatml, tmp_path, caplog):
    conversations = conversation_file(tmp_path / "a.jsonl", [{"messages": TURNS}])
    instructions = conversation_file(tmp_path / "b.jsonl", [{"instruction": "Count.", "output": "One."}])
    with caplog.at_level("INFO"):
        load_finetune_data("x", conversations, chatml, SampleSettings("chat", 500), 0, None)
        load_finetune_data("x", instructions, chatml, ALPACA, 0, None)
    assert "chat template" not in caplog.text


def test_load_finetune_data_caches_conversations_by_their_content(chatml, tmp_path):
    def load(*rows, tokenizer=chatml):
        path = conversation_file(tmp_path / "data.jsonl", rows)
        return load_finetune_data("x", path, tokenizer, ALPACA, 0, tmp_path / "cache")

    instruction = {"instruction": "Count.", "output": "One."}
    first = load(instruction, {"messages": TURNS})
    again = load(instruction, {"conversations": TURNS})
    assert (again.sha256, again.train[:]) == (first.sha256, first.train[:])
    changed = [
        load(instruction, {"messages": [*TURNS[:4], {**TURNS[4], "content": "No."}]}),
        load(instruction, {"messages": [{**TURNS[0], "role": "user"}, *TURNS[1:]]}),
        load(instruction, {"messages": TURNS}, tokenizer=bytes_tokenizer(REASONING)),
    ]
    assert len({data.sha256 for data in [first, *changed]}) == 4


def test_load_finetune_data_of_conversations_without_a_chat_template_is_refused(tmp_path):
    rows = [{"instruction": "Count.", "output": "One."}, {"messages": TURNS}]
    path = conversation_file(tmp_path / "data.jsonl", rows)
    message = r"data\.jsonl: 1 of 2 rows are conversations, but the tokenizer has no chat template; set chat_template"
    with pytest.raises(UserError, match=message) as error:
        load_finetune_data("x", path, bytes_tokenizer(None), ALPACA, 0, None)
    assert "\n" not in str(error.value)


def test_load_finetune_data_of_a_conversation_that_the_template_refuses_names_the_row(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}" + CHATML
    rows = [{"messages": []}, {"messages": TURNS[1:]}, {"messages": TURNS}]
    path = conversation_file(tmp_path / "data.jsonl", rows)
    message = r"data\.jsonl: row 2: the tokenizer's chat template fails \(TemplateError: no system\)$"
    with pytest.raises(UserError, match=message):
        load_finetune_data("x", path, bytes_tokenizer(template), ALPACA, 0, None)
