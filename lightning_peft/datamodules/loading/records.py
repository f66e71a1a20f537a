"""Where a task's records are, in a folder or on the hub; errors name the file and the record.

Two forms of data are read: data sets that lie in a folder or have a name on the hub
(:class:`Source`), and files of a fixed layout in either (:class:`RecordFiles`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_peft.datamodules.loading.cache import quiet_datasets
from lightning_peft.datamodules.loading.fields import filled, first_line, text_in
from lightning_peft.datamodules.loading.files import (
    Records,
    checked,
    is_file,
    is_folder,
    listing,
    read_file,
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
        texts: Fields that every record has to hold a text in.
    """

    files: tuple[str, ...]
    hub: str
    split: str
    config: str | None = None
    required: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def there(self, folder: str | None) -> list[Path]:
        """Find the source's files under a folder."""
        if folder is None or not is_folder(folder):
            return []
        listing(folder)  # in what cannot be listed, patterns find nothing
        found = (sorted(Path(folder).glob(pattern)) for pattern in self.files)
        return next((paths for paths in found if paths), [])

    def read(self, folder: str | None, cache_dir: str | None = None) -> Records:
        """Read the records.

        Args:
            folder: Where the files are; None takes the hub's.
            cache_dir: Where `datasets` keeps what it read of the hub; None takes its own place.

        Returns:
            The records, in their order.

        Raises:
            UserError: If there is no such file or data set, it cannot be read, holds no record,
                or one without a required field.
        """
        if folder is None:
            return checked(_from_hub(self, cache_dir), self.hub, self.required, self.texts)
        paths = self.there(folder)
        if not paths:
            kind = "holds no" if is_folder(folder) else "is no folder that holds a"
            raise UserError(
                f"data.data_dir {folder!r} {kind} {' or '.join(self.files)}; give the folder of "
                f"the data, or null for {self.hub} of the hub."
            )
        return [r for p in paths for r in read_file(p, self.required, self.texts)]


def _from_hub(source: Source, cache_dir: str | None) -> Records:
    import datasets

    with quiet_datasets():
        try:
            _ask_hub(source.hub)
            data = datasets.load_dataset(
                source.hub, source.config, split=source.split, cache_dir=cache_dir
            )
        except Exception as error:  # of many types, the hub's and the library's
            raise UserError(
                f"{source.hub} ({source.split}) cannot be loaded from the hub "
                f"({first_line(error)}); "
                "data.data_dir takes a folder instead."
            ) from error
    return data.to_list()


class RecordFiles:
    """Files of JSON records, in a folder or in a data set on the hub.

    Args:
        data_dir: A folder, or ``owner/name`` of a data set on the hub.
        cache_dir: Where files of the hub are kept; None takes the hub's own place.
    """

    def __init__(self, data_dir: str, cache_dir: str | None = None) -> None:
        self.name, self.cache_dir = data_dir, cache_dir
        self.folder = Path(data_dir) if is_folder(data_dir) else None
        self._on_hub = None if self.folder else _hub_files(data_dir)

    def has(self, file: str) -> bool:
        """Say whether a file is there."""
        if self.folder is not None:
            return is_file(self.folder / file)
        if self._on_hub is not None:
            return file in self._on_hub
        try:  # Offline, only what was loaded before is known.
            return bool(self._path(file))
        except Exception:
            return False

    def read(self, file: str, required: Sequence[str]) -> Records:
        """Read a file that is there.

        Args:
            file: Its path in the folder or data set.
            required: Fields that every record has to hold a text in.

        Returns:
            The records, in their order.

        Raises:
            UserError: If it is not JSON, holds no record, or one without a required field.
        """
        path = self._path(file)
        records = read_file(path)
        for number, record in enumerate(records, start=1):
            place = f"Record {number} of {path}"
            for field in required:
                if record.get(field) is None:
                    raise UserError(f"{place} has no text in {field!r}, only in {filled(record)}.")
                text_in(record, field, place)
        return records

    def _path(self, file: str) -> Path:
        """Where a file lies; one of the hub is fetched, as it is and running nothing of it."""
        if self.folder is not None:
            return self.folder / file
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    self.name, file, repo_type="dataset", cache_dir=self.cache_dir
                )
            )
        except Exception as error:  # of many types, the hub's and the disk's
            raise UserError(
                f"{self.name}/{file} cannot be loaded from the hub ({first_line(error)}); "
                "data.data_dir takes a folder instead."
            ) from error


def _hub_files(name: str) -> set[str] | None:
    """List the files of what may be a hub data set; None offline, where only the cache can tell."""
    missing = f"data.data_dir {name!r} is not a folder"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"{missing}, nor an owner/name on the hub; give the folder of the data.")
    try:
        return _ask_hub(name)
    except Exception as error:
        raise UserError(
            f"{missing}, and the hub does not give it ({first_line(error)})."
        ) from error


def _ask_hub(name: str) -> set[str] | None:
    """List a hub data set's files; asked once, since `load_dataset` retries for half a minute."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    info = HfApi().dataset_info(name, timeout=10)
    return {sibling.rfilename for sibling in info.siblings or ()}
