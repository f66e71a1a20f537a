"""Answers to prompts, decoded as a protocol says."""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import torch


class Decoding(Protocol):
    """How answers are decoded: what is read here of a benchmark's protocol."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer."""

    @property
    def num_beams(self) -> int:
        """Beams; 1 is greedy or sampled, by the temperature."""

    @property
    def temperature(self) -> float:
        """0 decodes without sampling."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts at which an answer ends, beside EOS."""


class Tokens(Protocol):
    """A tokenizer and its special tokens: what is read here of a data module's encoder."""

    tokenizer: Any
    pad_id: int
    eos_id: int


def generate(model: Any, batch: dict[str, Any], protocol: Decoding, encoder: Tokens) -> list[str]:
    """Answer left-padded prompts.

    Args:
        model: A causal language model of transformers.
        batch: With ``input_ids`` and ``attention_mask`` (batch, tokens), and ``prompt``, the texts.
        protocol: Says length, beams, temperature and stop texts.
        encoder: Holds the tokenizer, and says how rows are padded and end.

    Returns:
        The texts of the answers, without special tokens, cut before the first stop text.
    """
    tokenizer = encoder.tokenizer
    # The protocol decides; the model's own generation settings would else be filled in.
    options: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
    if protocol.temperature:
        options |= {"do_sample": True, "temperature": protocol.temperature}
        options |= {"top_k": 0, "top_p": 1.0}
    if protocol.stop:
        options |= {"stop_strings": list(protocol.stop), "tokenizer": tokenizer}
    with torch.random.fork_rng(enabled=bool(protocol.temperature)):
        if protocol.temperature:
            # Samples depend on the prompts alone, so that an interrupted test goes on alike.
            torch.manual_seed(zlib.crc32("\n".join(batch["prompt"]).encode()))
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=protocol.max_new_tokens,
            num_beams=protocol.num_beams,
            pad_token_id=encoder.pad_id,
            eos_token_id=encoder.eos_id,
            **options,
        )
    new = output[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [cut_at(text, protocol.stop) for text in texts]


def cut_at(text: str, stop: tuple[str, ...]) -> str:
    """Cut a text before the first of the stop texts."""
    ends = [text.find(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text
