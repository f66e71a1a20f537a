"""Conversations as people keep them, and as a tokenizer's chat template writes them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_peft.datamodules.loading.fields import filled, is_list, no_text
from lightning_peft.errors import UserError, shown

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
    "system": "system",
}

# Jinja keeps a template from files and code, but not from a loop that does not end.
SECONDS = 10.0


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        turns: Questions with their answers.
        system: The system's message, empty without one.
        open: A question at the end that nobody has answered.
    """

    turns: tuple[tuple[str, str], ...]
    system: str = ""
    open: str = ""


def read_chat(messages: Any, place: str) -> Chat:
    """Read a list of messages, each with ``role`` and ``content`` or with ``from`` and ``value``.

    What an assistant says before the first question is left out, as FastChat does.

    Args:
        messages: The list.
        place: Names it in errors.

    Raises:
        UserError: If it holds anything else, or the roles do not alternate.
    """
    if not is_list(messages) or not all(isinstance(m, Mapping) for m in messages):
        raise UserError(f"{place} holds no list of messages.")
    said = [_message(message, place) for message in messages]
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    while said and said[0][0] == "assistant":
        said.pop(0)
    for number, (role, _) in enumerate(said):
        if role != ("user", "assistant")[number % 2]:
            raise UserError(
                f"{place} has a message of the {role} where the other side's turn is; user and "
                "assistant have to alternate, a system message to come first."
            )
    texts = [text for _, text in said]
    left = texts.pop() if len(texts) % 2 else ""
    return Chat(tuple(zip(texts[::2], texts[1::2], strict=True)), system, left)


def _message(message: Mapping[str, Any], place: str) -> tuple[str, str]:
    keys = ("role", "content") if message.get("role") is not None else ("from", "value")
    role, text = (message.get(key) for key in keys)
    if isinstance(role, str) and text is not None and not isinstance(text, str):
        raise UserError(f"{place} has a message that {no_text(keys[1], text)}.")
    if not isinstance(role, str) or text is None:
        raise UserError(
            f"{place} has a message with {filled(message) or 'nothing'}; wanted are role and "
            "content, or from and value, as texts."
        )
    if role not in ROLES:
        raise UserError(f"{place} has the role {shown(role)}; known are {', '.join(ROLES)}.")
    return ROLES[role], text


class ChatTemplate:
    """A tokenizer's chat template, taken apart so that answers can carry the loss.

    Args:
        tokenizer: Must have a chat template.

    Attributes:
        end: The special token that ends an answer; empty where the template writes none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"data.chat_template is true, but the tokenizer {tokenizer.name_or_path!r} has "
                "none; take an instruction-tuned model's in data.tokenizer, or set it to false."
            )
        self.tokenizer = tokenizer
        self._specials = tokenizer.all_special_tokens
        self.end = ""
        answer = self.pieces(Chat((("q", "a"),)), "A conversation")[-1][1]
        self.end = next((t for t in self._specials if answer.endswith(t)), "")

    def pieces(self, chat: Chat, place: str) -> list[tuple[str, str]]:
        """Write each turn as what is given and what the assistant says, its end included.

        Line breaks that a template writes after an answer's end belong to the next question.

        Raises:
            UserError: If the template refuses the conversation, or writes earlier turns in
                another way than the last, so that no answer stands where it would be generated.
        """
        messages = [{"role": "system", "content": chat.system}] if chat.system else []
        done, pieces = "", []
        for question, answer in chat.turns:
            messages.append({"role": "user", "content": question})
            asked = self._write(messages, True, place)
            messages.append({"role": "assistant", "content": answer})
            answered = self._write(messages, False, place)
            if not (asked.startswith(done) and answered.startswith(asked)):
                raise UserError(
                    f"{place} cannot be trained on with the chat template of "
                    f"{self.tokenizer.name_or_path!r}, which writes a turn in another way when it "
                    "is not the last, or when it is to be generated; set data.chat_template: false."
                )
            response = answered[len(asked) :]
            if response.rstrip().endswith(tuple(self._specials)):
                response = response.rstrip()
            pieces.append((asked[len(done) :], response))
            done = asked + response
        return pieces

    def _write(self, messages: list[dict[str, str]], generate: bool, place: str) -> str:
        from jinja2.exceptions import TemplateError

        try:
            with _within(SECONDS):
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generate
                )
        except TemplateError as error:
            raise UserError(f"{place} is refused by the chat template: {error}.") from error
        except Exception as error:  # a template is a program, and may fail in any way
            reason = str(error).strip() or type(error).__name__
            raise UserError(
                f"{place} cannot be written by the chat template of "
                f"{self.tokenizer.name_or_path!r} ({reason}); take another tokenizer, or set "
                "data.chat_template: false."
            ) from error
        return str(text)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """End what takes longer, by an alarm, which only a main thread can set."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it ran for more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    begun, left = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    try:
        yield
    finally:
        # Somebody else's alarm goes on; one that is due rings now, before another of ours begins.
        rest = max(left - (time.monotonic() - begun), 1e-6) if left else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, rest)
