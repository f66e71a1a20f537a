"""What was tokenized once is read again, under a key of everything that token ids depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.datamodules.loading.files import quiet_datasets

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Raise it when `encode` changes, so that what was cached before is not read again.
ENCODING_VERSION = 2


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, *more: Any) -> str:
    """Identify a tokenizer, and what else (in any form that JSON holds) encodings depend on."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by each call's arguments; they say nothing about the tokenizer.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = {"class": type(tokenizer).__name__, **tokenizer.get_vocab()}
    known = [ENCODING_VERSION, content, *more]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def cached_columns(
    encode: Callable[[list[int]], dict[str, list[Any]]],
    count: int,
    key: str,
    cache_dir: str | Path | None,
) -> Dataset:
    """Make the columns of ``count`` rows, or read those that an earlier run made under a key.

    The library writes to a temporary file and moves it into its place, so that a run killed here
    leaves nothing half-written.

    Args:
        encode: Makes the columns of the rows with some positions.
        count: How many rows there are.
        key: Says everything the columns depend on.
        cache_dir: The folder; None takes ``lightning_peft`` in the cache of `datasets`.

    Returns:
        The rows, in order of their positions.
    """
    import datasets

    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "lightning_peft")
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_datasets():
        return datasets.Dataset.from_dict({"position": range(count)}).map(
            encode,
            input_columns="position",
            batched=True,
            remove_columns="position",
            cache_file_name=os.fspath(folder / f"{key}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=key,
        )
