"""Texts and pairs of texts to be recognised: how they become token ids.

Where a tokenizer has an encoding of pairs of its own (BERT's ``[CLS] A [SEP] B [SEP]``, RoBERTa's
``<s> A </s></s> B </s>``), that is used. One that puts nothing between the two texts, or only a
second BOS (LLaMA), is given a template of ours instead: ``Premise: A`` and, on the next line,
``Hypothesis: B``, each tokenized apart, with the special tokens around both that the tokenizer puts
around one text. Records over the limit lose the end of the longer text first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.datamodules.loading.cache import cached_columns, tokenizer_fingerprint
from lightning_peft.datamodules.loading.labelled import Labelled
from lightning_peft.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, list[Any]]


class PairEncoder:
    """Turns texts and pairs into token ids.

    Args:
        tokenizer: Any tokenizer. Where it has no pad token, EOS serves as one.
        max_length: Limit in tokens, special ones included; the tokenizer's own, if lower, holds.
        names: What the two texts of a pair are called in our template.

    Attributes:
        pairs: Whether the tokenizer joins pairs itself.
        pad_id: What batches are padded with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        names: tuple[str, str] = ("Text 1", "Text 2"),
    ) -> None:
        pad_id = tokenizer.pad_token_id
        pad_id = tokenizer.eos_token_id if pad_id is None else pad_id
        if pad_id is None:
            raise UserError(
                f"data.tokenizer {tokenizer.name_or_path!r} has neither a pad nor an EOS token to "
                "fill batches with; set its pad_token."
            )
        self.tokenizer, self.names = tokenizer, names
        self.pad_id: int = pad_id
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.pairs = _separates(tokenizer)
        self.prefix, self.suffix = _around(tokenizer)

    def encode(self, firsts: Sequence[str], seconds: Sequence[str] | None) -> Columns:
        """Encode texts or pairs.

        Args:
            firsts: Texts.
            seconds: The other ones; None for single texts.

        Returns:
            Columns ``tokens``, ``types`` (where the tokenizer gives token types) and ``cut``, how
            many tokens did not fit.
        """
        if seconds is not None and not self.pairs:
            return self._by_template(firsts, seconds)
        texts = [list(firsts), *([list(seconds)] if seconds is not None else [])]
        # `verbose=False`: what is over `model_max_length` is cut below, and needs no warning here.
        encoded = self.tokenizer(*texts, verbose=False)
        ids, types = list(encoded["input_ids"]), list(encoded.get("token_type_ids") or [])
        cut = [max(0, len(row) - self.max_length) for row in ids]
        long = [i for i, over in enumerate(cut) if over]
        if long:
            again = self.tokenizer(
                *([column[i] for i in long] for column in texts),
                truncation="longest_first",
                max_length=self.max_length,
            )
            for place, i in enumerate(long):
                ids[i] = again["input_ids"][place]
                if types:
                    types[i] = again["token_type_ids"][place]
        return {"tokens": ids, **({"types": types} if types else {}), "cut": cut}

    def _by_template(self, firsts: Sequence[str], seconds: Sequence[str]) -> Columns:
        one, other = self.names
        halves = [f"{one}: {a}" for a in firsts], [f"\n{other}: {b}" for b in seconds]
        encoded = [
            self.tokenizer(half, add_special_tokens=False, verbose=False)["input_ids"]
            for half in halves
        ]
        room = self.max_length - len(self.prefix) - len(self.suffix)
        columns: Columns = {"tokens": [], "cut": []}
        for a, b in zip(*encoded, strict=True):
            keep_a, keep_b = longest_first(len(a), len(b), room)
            columns["tokens"].append([*self.prefix, *a[:keep_a], *b[:keep_b], *self.suffix])
            columns["cut"].append(len(a) + len(b) - keep_a - keep_b)
        return columns

    @property
    def template(self) -> str:
        """Our template for pairs."""
        return f"{self.names[0]}: {{first}}\n{self.names[1]}: {{second}}"

    def cached(self, records: Sequence[Labelled], cache_dir: str | None) -> datasets.Dataset:
        """Encode records, or read what an earlier run encoded of the same texts in the same way."""
        import datasets

        if not records:
            return datasets.Dataset.from_dict({"tokens": [], "cut": []})
        around = [self.prefix, self.suffix, self.pairs, self.template, self.max_length]
        digest = hashlib.sha256(tokenizer_fingerprint(self.tokenizer, *around).encode())
        for record in records:
            digest.update(json.dumps([record.first, record.second]).encode())

        def encode(positions: list[int]) -> Columns:
            rows = [records[i] for i in positions]
            seconds = [r.second for r in rows if r.second is not None]
            return self.encode([r.first for r in rows], seconds or None)

        return cached_columns(encode, len(records), digest.hexdigest()[:32], cache_dir)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens two texts keep, when the longer one gives up tokens first.

    Args:
        first: Length of the first.
        second: Length of the second.
        room: Limit of both together.

    Returns:
        What each keeps; of equal ones that lose an odd number, the second loses one more.
    """
    over = max(0, first + second - room)
    if over <= abs(first - second):
        return (first - over, second) if first > second else (first, second - over)
    return room - room // 2, room // 2


def _separates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts special tokens other than BOS between the texts of a pair."""
    encoded = tokenizer("x", "x", return_special_tokens_mask=True)
    special = np.array(encoded["special_tokens_mask"], dtype=bool)
    text = np.flatnonzero(~special)
    between = np.flatnonzero(special[: text[-1]])
    ids = np.array(encoded["input_ids"])[between[between > text[0]]]
    return bool((ids != tokenizer.bos_token_id).any())


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    encoded = tokenizer("x", return_special_tokens_mask=True)
    text = [i for i, special in enumerate(encoded["special_tokens_mask"]) if not special]
    ids = list(encoded["input_ids"])
    return ids[: text[0]], ids[text[-1] + 1 :]
