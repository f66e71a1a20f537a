"""From texts to token ids: what is encoded, where it is cut, and the cache that keeps it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Raise it when `encode` changes, so that what was cached before is not read again.
ENCODING_VERSION = 1


@dataclass(frozen=True)
class Example:
    """One record of a task.

    Attributes:
        prompt: The whole prompt, template included.
        response: What the model learns to answer; empty where it is only tested.
        task: The task it belongs to.
        index: Its position in the task's data, from 0, by which messages and predictions name it.
        expected: The answer that the extracted one is compared with.
    """

    prompt: str
    response: str
    task: str
    index: int
    expected: str = ""


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
            raise ValueError(
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
            with_response: Join prompt, response and EOS, as for training; else prompts only.

        Returns:
            Columns: ``tokens``; ``prompt_length``, how many of them are BOS and prompt; ``cut``,
            how many prompt tokens did not fit.
        """
        prompts = self.texts([e.prompt for e in examples])
        responses: list[list[int]] = [[] for _ in examples]
        if with_response:
            responses = [[*ids, self.eos_id] for ids in self.texts([e.response for e in examples])]
        columns: dict[str, list[Any]] = {"tokens": [], "prompt_length": [], "cut": []}
        for example, prompt, response in zip(examples, prompts, responses, strict=True):
            room = self.max_length - len(self.prefix) - len(response)
            if room < 0:
                raise ValueError(
                    f"Record {example.index + 1} of {example.task} has a response of "
                    f"{len(response)} tokens with its EOS, over the limit of {self.max_length}; "
                    "raise data.max_length."
                )
            cut = max(0, len(prompt) - room)
            columns["tokens"].append([*self.prefix, *prompt[cut:], *response])
            columns["prompt_length"].append(len(self.prefix) + len(prompt) - cut)
            columns["cut"].append(cut)
        return columns

    def fingerprint(self) -> str:
        """Identify everything the ids depend on beside the texts."""
        if self.tokenizer.is_fast:
            content = json.loads(self.tokenizer.backend_tokenizer.to_str())
            # Set by each call's arguments; they say nothing about the tokenizer.
            content.pop("truncation", None)
            content.pop("padding", None)
        else:
            content = {"class": type(self.tokenizer).__name__, **self.tokenizer.get_vocab()}
        known = [ENCODING_VERSION, content, self.prefix, self.eos_id, self.max_length]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def encode_cached(
    encoder: Encoder, examples: Sequence[Example], with_response: bool, cache_dir: str | Path | None
) -> Dataset:
    """Encode examples, or read what an earlier run encoded of the same texts in the same way.

    The library writes to a temporary file and moves it into its place, so that a run killed here
    leaves nothing half-written.

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
        digest.update(json.dumps([example.prompt, example.response * with_response]).encode())
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "lightning_peft")
    folder.mkdir(parents=True, exist_ok=True)
    key = digest.hexdigest()[:32]

    def encode(indices: list[int]) -> dict[str, list[Any]]:
        return encoder.encode([examples[i] for i in indices], with_response)

    with quiet_datasets():
        return datasets.Dataset.from_dict({"position": range(len(examples))}).map(
            encode,
            input_columns="position",
            batched=True,
            remove_columns="position",
            cache_file_name=os.fspath(folder / f"{key}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=key,
        )


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence `datasets`: a progress bar for each small file, and errors that are raised too."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not silenced:
            datasets.enable_progress_bars()
