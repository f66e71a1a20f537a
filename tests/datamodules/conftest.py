"""Tokenizers and small records for the tests of data modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<s>", "</s>"]


def _alphabet() -> list[str]:
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in visible else next(hidden) for byte in range(256)]


def build_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), adds_bos: bool = False, **special: Any
) -> PreTrainedTokenizerFast:
    """Three special tokens, then the 256 bytes in order, then merges."""
    tokens = [*SPECIALS, *_alphabet(), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIALS])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def ids(text: str) -> list[int]:
    """What the byte-level tokenizer makes of a text."""
    return [3 + byte for byte in text.encode()]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def byte_ids() -> Callable[[str], list[int]]:
    return ids


LABELS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    "ARC-Easy": ["answer1", "answer2", "answer3", "answer4", "answer5"],
    "ARC-Challenge": ["answer1", "answer2", "answer3", "answer4"],
    "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
}
TRAINED = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")


def record(task: str, index: int) -> dict[str, str]:
    """A record in the LLM-Adapters layout, of a length that differs from its neighbours'."""
    labels = LABELS[task]
    answer = labels[index % len(labels)]
    return {
        "instruction": f"{task} {index}: {'why ' * (index * 7 % 11)}?\n\nAnswer format: "
        + "/".join(labels),
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.fixture
def commonsense_dir(tmp_path: Path) -> Path:
    """Eight tasks of ten test records, four of them with twenty training records."""
    for task in LABELS:
        folder = tmp_path / "commonsense" / task
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps([record(task, i) for i in range(10)]))
        if task in TRAINED:
            (folder / "train.json").write_text(json.dumps([record(task, i) for i in range(20)]))
    return tmp_path / "commonsense"
