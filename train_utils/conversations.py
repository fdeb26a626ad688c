"""Conversations for fine-tuning: rows of messages, their tokens in the chat template, and the spans of the answers."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any

from slim_utils.common.errors import UserError
from slim_utils.text_source import Row, first_filled, text_value
from train_utils.prompts import chat_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One turn: role and content.
Message = dict[str, str]
MESSAGES = "messages"
CONVERSATION_COLUMNS = (MESSAGES, "conversations")
ASSISTANT = "assistant"
# The roles of chat templates, and ShareGPT's names for them.
ROLES = {"system": "system", "user": "user", ASSISTANT: ASSISTANT, "tool": "tool", "human": "user", "gpt": ASSISTANT}


def is_conversation(row: Row) -> bool:
    """Whether ``row`` is a conversation; an instruction row may have the columns of one, filled with null."""
    column = first_filled(row, CONVERSATION_COLUMNS)
    return column is not None and (row[column] is not None or not {"instruction", "output"} <= row.keys())


def conversation_row(row: Row) -> Row:
    """The conversation in ``row`` as the single column ``messages``: a list of ``Message``.

    Args:
        row: a row with ``messages`` (keys ``role`` and ``content``) or ``conversations`` (ShareGPT's ``from`` and
            ``value``); the keys of both are read in either column.

    Raises:
        UserError: if the column is not a list, naming it, or a message is unusable, naming its number.
    """
    column = first_filled(row, CONVERSATION_COLUMNS)
    assert column is not None
    if not isinstance(row[column], list):
        raise UserError(f"{column} is {type(row[column]).__name__}, not a list of messages")
    messages = []
    for index, message in enumerate(row[column]):
        try:
            messages.append(check_message(message))
        except UserError as error:
            raise UserError(f"message {index}: {error}") from None
    return {MESSAGES: messages}


def check_message(message: Any) -> Message:
    """Role and content of ``message``, with the role's name in chat templates and the content as one text.

    Raises:
        UserError: if a key is missing, the role is unknown, the content is not text, or the message calls tools.
    """
    if not isinstance(message, dict):
        raise UserError(f"{type(message).__name__}, not an object with role and content")
    role_key, content_key = first_filled(message, ("role", "from")), first_filled(message, ("content", "value"))
    if role_key is None or content_key is None:
        raise UserError(f"needs role and content, or from and value, but has: {', '.join(message)}")
    role = message[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"unknown role {role!r}; choose one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise UserError("tool_calls are not supported; write the calls into the content")
    return {"role": ROLES[role], "content": content_text(message, content_key)}


def content_text(message: dict[str, Any], key: str) -> str:
    """The content of ``message`` under ``key``; null is empty, and parts of a list are joined.

    Raises:
        UserError: if the content, or a part of it, is not text.
    """
    content = message[key]
    if content is None:
        return ""
    if not isinstance(content, list):
        return text_value(message, key)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or "text" not in part:
            raise UserError(f"{key} has a part of type {kind!r}, not a text")
    return "".join(text_value(part, "text") for part in content)


def instruction_messages(row: Row) -> list[Message]:
    """An instruction row as a conversation of one question and one answer."""
    question = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return [{"role": "user", "content": question}, {"role": ASSISTANT, "content": row["output"]}]


def is_answer(message: Message) -> bool:
    """Whether ``message`` is an assistant's, and not blank."""
    return message["role"] == ASSISTANT and bool(message["content"].strip())


def encode_conversation(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation in the tokenizer's chat template, and the span (start, end) of every answer in them.

    A span holds the tokens that the model has to write: those after the generation prompt, up to and including what
    the template writes to end the turn. A template contains the special tokens; none are added.

    Raises:
        UserError: if the tokenizer has no chat template, or the template fails.
    """
    ids = chat_ids(messages, tokenizer)
    spans = [
        (answer_start(messages, index, tokenizer, ids), answer_end(messages, index, tokenizer, ids))
        for index, message in enumerate(messages)
        if is_answer(message)
    ]
    return ids, spans


def chat_ids(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of ``messages`` in the tokenizer's chat template."""
    text = chat_text(tokenizer, messages, add_generation_prompt)
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def answer_start(messages: list[Message], index: int, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Position of the first token of answer ``index`` in ``ids``, those of all ``messages``.

    It is the length of the common prefix of ``ids`` and the earlier turns with generation prompt. If the template
    writes these turns differently when an answer follows (Mistral's puts the system prompt into a last question), it is
    the first difference from the conversation with this answer empty.
    """
    history = messages[:index]
    # Templates may fail without any message.
    if history:
        prompt = chat_ids(history, tokenizer, add_generation_prompt=True)
        length = common_prefix(prompt, ids)
        if length == len(prompt) or length >= common_prefix(prompt, chat_ids(history, tokenizer)):
            return length
    return common_prefix(chat_ids(without_answer(messages, index), tokenizer), ids)


def answer_end(messages: list[Message], index: int, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Position in ``ids``, those of all ``messages``, after answer ``index`` and the tokens that end its turn.

    It is the length of the common prefix of ``ids`` and the conversation up to the answer. If the template writes these
    turns differently when others follow (Qwen3's removes reasoning), it is the last difference from the conversation
    with this answer empty, plus the tokens that end the turn.
    """
    if index == len(messages) - 1:
        return len(ids)
    turns = messages[: index + 1]
    answered = chat_ids(turns, tokenizer)
    length = common_prefix(answered, ids)
    # The last token may merge with the next turn.
    if length >= len(answered) - 1:
        return length
    content_end = len(ids) - common_suffix(chat_ids(without_answer(messages, index), tokenizer), ids)
    num_closing = common_suffix(chat_ids(without_answer(turns, index), tokenizer), answered)
    closing = answered[len(answered) - num_closing :]
    return max(length, content_end + common_prefix(closing, ids[content_end:]))


def without_answer(messages: list[Message], index: int) -> list[Message]:
    """``messages`` with an empty answer ``index``."""
    return [*messages[:index], {"role": ASSISTANT, "content": ""}, *messages[index + 1 :]]


def common_prefix(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def common_suffix(first: list[int], second: list[int]) -> int:
    """Length of the longest common suffix."""
    return common_prefix(first[::-1], second[::-1])
