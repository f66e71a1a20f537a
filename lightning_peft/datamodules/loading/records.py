"""Where a task's records are, in a folder or on the hub; errors name the file and the record.

Two forms of data are read: data sets that lie in a folder or have a name on the hub
(:class:`Source`), and files of a fixed layout in either (:class:`RecordFiles`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.datamodules.loading.files import (
    Records,
    checked,
    one_sentence,
    quiet_datasets,
    read_file,
    rows_of,
)
from lightning_peft.errors import UserError


@dataclass(frozen=True)
class Source:
    """One split of one data set, where it lies in a folder and on the hub.

    Attributes:
        files: Glob patterns under the folder; the first that matches is read, with all its files.
        hub: ``owner/name`` on the hub.
        split: The split there.
        config: The configuration there.
        required: Fields that every record has to hold something in.
    """

    files: tuple[str, ...]
    hub: str
    split: str
    config: str | None = None
    required: tuple[str, ...] = ()

    def there(self, folder: str | None) -> list[Path]:
        """Find the source's files under a folder."""
        if folder is None:
            return []
        found = (sorted(Path(folder).glob(pattern)) for pattern in self.files)
        return next((paths for paths in found if paths), [])

    def read(self, folder: str | None, cache_dir: str | None = None) -> Records:
        """Read the records.

        Args:
            folder: Where the files are; None takes the hub's.
            cache_dir: Where `datasets` keeps what it read; None takes its own place.

        Returns:
            The records, in their order.

        Raises:
            UserError: If there is no such file or data set, it cannot be read, holds no record,
                or one without a required field.
        """
        if folder is None:
            return checked(_from_hub(self, cache_dir), self.hub, self.required)
        paths = self.there(folder)
        if not paths:
            kind = "holds no" if Path(folder).is_dir() else "is no folder that holds a"
            raise UserError(
                f"data.data_dir {folder!r} {kind} {' or '.join(self.files)}; give the folder of "
                f"the data, or null for {self.hub} of the hub."
            )
        return [r for p in paths for r in read_file(p, self.required, cache_dir)]


def _from_hub(source: Source, cache_dir: str | None) -> Records:
    import datasets

    with quiet_datasets():
        try:
            _ask_hub(source.hub)
            data = datasets.load_dataset(
                source.hub, source.config, split=source.split, cache_dir=cache_dir
            )
        except Exception as error:  # of many types, the hub's and the library's
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{source.hub} ({source.split}) cannot be loaded from the hub ({reason}); "
                "data.data_dir takes a folder instead."
            ) from error
    return data.to_list()


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
            UserError: If it is not JSON, holds no record, or one without a required field.
        """
        place = str(self.folder / file) if self.folder else f"{self.name}/{file}"
        records = one_sentence(lambda: self._load(file), place)
        for number, record in enumerate(records, start=1):
            for field in required:
                if not isinstance(record.get(field), str):
                    found = ", ".join(k for k, v in record.items() if v is not None)
                    raise UserError(
                        f"Record {number} of {place} has no text in {field!r}, only in {found}."
                    )
        return records

    def _load(self, file: str) -> Records:
        import datasets

        if self.folder is not None:
            return rows_of("json", str(self.folder / file), self.cache_dir)
        with quiet_datasets():
            data = datasets.load_dataset(
                self.name, data_files=[file], split="train", cache_dir=self.cache_dir
            )
        return data.to_list()


def _hub_files(name: str) -> set[str] | None:
    """List the files of what may be a hub data set; None offline, where only the cache can tell."""
    missing = f"data.data_dir {name!r} is not a folder"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"{missing}, nor an owner/name on the hub; give the folder of the data.")
    try:
        return _ask_hub(name)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{missing}, and the hub does not give it ({reason}).") from error


def _ask_hub(name: str) -> set[str] | None:
    """List a hub data set's files; asked once, since `load_dataset` retries for half a minute."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    info = HfApi().dataset_info(name, timeout=10)
    return {sibling.rfilename for sibling in info.siblings or ()}
