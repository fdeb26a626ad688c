"""Prompt templates for instruction data, and the tokenizer's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim_utils.common.errors import UserError, error_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Template:
    """Prompt templates for rows with and without an ``input``."""

    with_input: str
    without_input: str

    def prompt(self, instruction: str, context: str) -> str:
        """The text before the answer."""
        template = self.with_input if context else self.without_input
        return template.format(instruction=instruction, input=context)


# The prompts of Stanford Alpaca and their Chinese translation.
_ALPACA = Template(
    with_input=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    without_input=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
)
_ALPACA_ZH = Template(
    with_input=(
        "以下是一条描述任务的指令，并附有提供更多背景的输入。请写出恰当完成该请求的回答。\n\n"
        "### 指令：\n{instruction}\n\n### 输入：\n{input}\n\n### 回答：\n"
    ),
    without_input="以下是一条描述任务的指令。请写出恰当完成该请求的回答。\n\n### 指令：\n{instruction}\n\n### 回答：\n",
)
_NONE = Template(with_input="{instruction}\n{input}\n", without_input="{instruction}\n")

CHAT, NO_TEMPLATE = "chat", "none"
TEMPLATES: dict[str, Template | None] = {"alpaca": _ALPACA, "alpaca_zh": _ALPACA_ZH, NO_TEMPLATE: _NONE, CHAT: None}


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    """The text of ``messages``, each with ``role`` and ``content``, in the chat template of the tokenizer.

    Raises:
        UserError: if the tokenizer has no chat template, or the template fails.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:
        # A template is third-party code: it may raise any exception, also on purpose.
        raise UserError(f"the tokenizer's chat template fails ({error_reason(error)})") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str, model_path: str) -> None:
    """Check that the tokenizer of ``model_path`` has the tokens to end and pad samples and a working chat template.

    Raises:
        UserError: if the EOS token is missing or, for ``chat``, the template is missing or fails.
    """
    padded = tokenizer.pad_token is not None
    if tokenizer.eos_token is None and not (template == CHAT and padded):
        raise UserError(
            f"--model_name_or_path: the tokenizer of {model_path} has no end-of-sequence token; set eos_token in its "
            "tokenizer_config.json"
        )
    if template == CHAT:
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        try:
            chat_text(tokenizer, [question], add_generation_prompt=True)
            chat_text(tokenizer, [question, answer])
        except UserError as error:
            raise UserError(f"--prompt_template_name {CHAT}: {error}; choose alpaca") from error
