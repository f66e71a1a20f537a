"""Prompts with responses: what is encoded of them, and where it is cut."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.datamodules.loading.cache import cached_columns, tokenizer_fingerprint
from lightning_peft.datamodules.loading.fields import no_text
from lightning_peft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One record of a task.

    Attributes:
        prompt: The whole prompt, template included.
        response: What the model learns to answer; empty where it is only tested.
        task: The task it belongs to.
        index: Its position in the task's data, from 0, by which messages and predictions name it.
        expected: What an answer is judged by, in any form that JSON holds.
        history: Earlier turns of a conversation, (prompt, response) each, before this one. Their
            responses carry loss too.
        closed: Whether responses end by themselves, as a chat template's do; else EOS is added.
    """

    prompt: str
    response: str
    task: str
    index: int
    expected: Any = ""
    history: tuple[tuple[str, str], ...] = ()
    closed: bool = False


def checked_example(example: Example) -> Example:
    """Return an example, or refuse one that does not hold texts."""
    texts = {"prompt": example.prompt, "response": example.response}
    for number, turn in enumerate(example.history, start=1):
        texts |= {f"history, turn {number}, {i}": text for i, text in enumerate(turn)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"Record {example.index + 1} of {example.task} {no_text(name, text)}.")
    return example


class Encoder:
    """Turns examples into token ids.

    Prompt and response are tokenized apart and then joined, so that the boundary between what is
    given and what is learnt is exact, and a test prompt has the very ids it had in training.

    Args:
        tokenizer: Any tokenizer with an EOS token. Where it has no pad token, EOS serves as one:
            padding is told by its position and never carries a label.
        max_length: Limit in tokens, BOS and EOS included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"data.tokenizer {tokenizer.name_or_path!r} has no EOS token, so no response could "
                "ever end; set its eos_token."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos_id: int = tokenizer.eos_token_id
        pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
        self.pad_id: int = self.eos_id if pad is None else pad
        # A model wants BOS where its tokenizer puts it in front by itself, as LLaMA's does.
        adds_bos = bos is not None and list(tokenizer("x")["input_ids"])[:1] == [bos]
        self.prefix: list[int] = [bos] if adds_bos else []

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts as they are, without special tokens around them."""
        if not texts:
            return []
        # `verbose=False`: a text over `model_max_length` is cut below, and needs no warning here.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def encode(self, examples: Sequence[Example], with_response: bool) -> dict[str, list[Any]]:
        """Encode examples.

        Args:
            examples: What to encode.
            with_response: Join turns, prompt, response and EOS, as for training; else prompts only.

        Returns:
            Columns: ``tokens``; ``prompt_length``, how many of them stand before the last response;
            ``earlier``, where earlier responses begin and end (a flat list); ``cut``, how many
            tokens on the left did not fit. Where not even the last response fits, ``tokens`` is
            empty.
        """
        texts = [_texts(e) if with_response else [e.prompt] for e in examples]
        encoded = iter(self.texts([text for pieces in texts for text in pieces]))
        columns: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "prompt_length", "earlier", "cut")
        }
        for example, pieces in zip(examples, texts, strict=True):
            ids = [next(encoded) for _ in pieces]
            if not example.closed:
                ids[1::2] = [[*piece, self.eos_id] for piece in ids[1::2]]
            row = self._joined(ids)
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
        return columns

    def _joined(self, pieces: list[list[int]]) -> tuple[list[int], int, list[int], int]:
        """Join the pieces of one example, cut on the left."""
        if pieces[0][: len(self.prefix)] == self.prefix:  # a chat template brings its own
            pieces[0] = pieces[0][len(self.prefix) :]
        room = self.max_length - len(self.prefix)
        tokens = list(itertools.chain.from_iterable(pieces))
        response = len(pieces[-1]) if len(pieces) > 1 else 0
        if response > room:
            return [], 0, [], len(tokens) - response
        cut = max(0, len(tokens) - room)
        # Where pieces end in the row; those that were cut end with the prefix.
        lengths = itertools.accumulate(map(len, pieces))
        ends = [max(length - cut, 0) + len(self.prefix) for length in lengths]
        earlier = [p for i in range(1, len(pieces) - 1, 2) for p in ends[i - 1 : i + 1]]
        return [*self.prefix, *tokens[cut:]], ends[-1] - response, earlier, cut

    def fingerprint(self) -> str:
        """Identify everything the ids depend on beside the texts."""
        return tokenizer_fingerprint(self.tokenizer, self.prefix, self.eos_id, self.max_length)


def encode_cached(
    encoder: Encoder, examples: Sequence[Example], with_response: bool, cache_dir: str | Path | None
) -> Dataset:
    """Encode examples, or read what an earlier run encoded of the same texts in the same way.

    Args:
        encoder: The encoder.
        examples: What to encode.
        with_response: As in :meth:`Encoder.encode`.
        cache_dir: The folder; None takes ``lightning_peft`` in the cache of `datasets`.

    Returns:
        A `datasets.Dataset` with the columns of :meth:`Encoder.encode`, in the examples' order.
    """
    import datasets

    if not examples:
        return datasets.Dataset.from_dict(encoder.encode([], with_response))
    digest = hashlib.sha256(f"{encoder.fingerprint()} {with_response}".encode())
    for example in examples:
        texts = [*_texts(example), example.closed] if with_response else [example.prompt]
        digest.update(json.dumps(texts).encode())

    def encode(indices: list[int]) -> dict[str, list[Any]]:
        return encoder.encode([examples[i] for i in indices], with_response)

    return cached_columns(encode, len(examples), digest.hexdigest()[:32], cache_dir)


def _texts(example: Example) -> list[str]:
    """Return prompts and responses in turn."""
    return [*itertools.chain.from_iterable(example.history), example.prompt, example.response]
