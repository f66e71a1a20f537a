"""What was tokenized once is read again, under a key of everything that token ids depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.datamodules.loading.files import reason
from lightning_peft.errors import UserError

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
    leaves nothing half-written. What was cut off otherwise is made again.

    Args:
        encode: Makes the columns of the rows with some positions.
        count: How many rows there are.
        key: Says everything the columns depend on.
        cache_dir: The folder; None takes ``lightning_peft`` in the cache of `datasets`.

    Returns:
        The rows, in order of their positions.

    Raises:
        UserError: If the folder cannot be written.
    """
    import datasets

    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "lightning_peft")
    file = folder / f"{key}.arrow"

    def columns(load: bool) -> Dataset:
        return datasets.Dataset.from_dict({"position": range(count)}).map(
            encode,
            input_columns="position",
            batched=True,
            remove_columns="position",
            cache_file_name=os.fspath(file),
            load_from_cache_file=load,
            new_fingerprint=key,
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_datasets():
            return columns(load=_is_whole(file, count))
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be written ({reason(error)}); data.cache_dir names "
            "another."
        ) from error


def _is_whole(file: Path, count: int) -> bool:
    """Say whether a cached file can be read and holds as many rows as were encoded."""
    import datasets

    if not file.is_file():
        return False
    try:
        return len(datasets.Dataset.from_file(os.fspath(file))) == count
    except (OSError, ValueError):  # cut off, or of something else
        return False


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
