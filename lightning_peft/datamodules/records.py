"""Reading records by `datasets`, from a folder or the hub; errors name the file and the record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.datamodules.examples import quiet_datasets


class RecordFiles:
    """Files of JSON records, in a folder or in a data set on the hub.

    Args:
        data_dir: A folder, or ``owner/name`` of a data set on the hub.
        cache_dir: Where `datasets` keeps what it read; None takes its own place.
    """

    def __init__(self, data_dir: str, cache_dir: str | None = None) -> None:
        self.name, self.cache_dir = data_dir, cache_dir
        self.folder = Path(data_dir) if Path(data_dir).is_dir() else None
        self._on_hub = None if self.folder else _hub_files(data_dir)

    def has(self, file: str) -> bool:
        """Say whether a file is there."""
        if self.folder is not None:
            return (self.folder / file).is_file()
        if self._on_hub is not None:
            return file in self._on_hub
        try:  # Offline, only what was loaded before is known.
            return bool(self._load(file))
        except Exception:
            return False

    def read(self, file: str, required: Sequence[str]) -> list[dict[str, Any]]:
        """Read a file that is there.

        Args:
            file: Its path in the folder or data set.
            required: Fields that every record has to hold a text in.

        Returns:
            The records, in their order.

        Raises:
            ValueError: If it is not JSON, holds no record, or one without a required field.
        """
        from datasets.exceptions import DatasetGenerationError

        place = str(self.folder / file) if self.folder else f"{self.name}/{file}"
        try:
            records = self._load(file)
        except DatasetGenerationError as error:
            raise ValueError(f"{place} is not JSON ({error.__cause__ or error}).") from error
        except (ValueError, StopIteration) as error:
            raise ValueError(f"{place} holds no record.") from error
        for number, record in enumerate(records, start=1):
            for field in required:
                if not isinstance(record.get(field), str):
                    found = ", ".join(k for k, v in record.items() if v is not None)
                    raise ValueError(
                        f"Record {number} of {place} has no text in {field!r}, only in {found}."
                    )
        return records

    def _load(self, file: str) -> list[dict[str, Any]]:
        import datasets

        with quiet_datasets():
            if self.folder is not None:
                name, data_file = "json", str(self.folder / file)
            else:
                name, data_file = self.name, file
            # `data_files` as a list: a path may hold characters of a glob pattern.
            data = datasets.load_dataset(
                name, data_files=[_literal(data_file)], split="train", cache_dir=self.cache_dir
            )
        return data.to_list()


def _literal(path: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", path)


def _hub_files(name: str) -> set[str] | None:
    """List a hub data set's files; None offline, where only the cache can tell."""
    missing = f"data.data_dir {name!r} is not a folder"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"{missing}, nor an owner/name on the hub; give the folder of the data.")
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        # Asked first, and once: `load_dataset` would retry for half a minute.
        info = HfApi().dataset_info(name, timeout=10)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{missing}, and the hub does not give it ({reason}).") from error
    return {sibling.rfilename for sibling in info.siblings or ()}
