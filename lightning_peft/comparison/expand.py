"""The runs of a comparison: grids put in the place of their runs, files looked up."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_peft.comparison.schema import Comparison, Settings
from lightning_peft.errors import MissingFile, UserError
from lightning_peft.settings.names import hint_at
from lightning_peft.settings.tree import to_words

Words = list[str]


def expand(comparison: Comparison, folder: Path) -> dict[str, Words]:
    """Every run's own options of ``fit``, grids put in the place of their runs.

    Args:
        comparison: What is asked for.
        folder: Where files are looked for.

    Raises:
        UserError: If two runs end with one name, or a grid's run does not exist.
    """
    for name in comparison.grid:
        if name not in comparison.runs:
            raise UserError(f"grid.{name} is no run; {hint_at(name, comparison.runs)}")
        for key, values in comparison.grid[name].items():
            if not values:
                raise UserError(f"grid.{name}.{key} is empty; give at least one value to try.")
    found: dict[str, Words] = {}
    folders: dict[str, str] = {}
    for name, settings in comparison.runs.items():
        words = words_of(settings, folder, f"runs.{name}")
        for label, more in _points(comparison.grid.get(name, {})):
            full = f"{name} {label}".strip()
            # Names are folders, and not every file system tells capitals apart.
            same = folders.setdefault(_as_folder(full), full)
            if same != full or full in found:
                raise UserError(f"two runs have the name {full!r}; give one another name.")
            found[full] = [*words, *more]
    if not found:
        raise UserError("runs is empty; give at least one.")
    return found


def _points(grid: dict[str, list[Any]]) -> Iterator[tuple[str, Words]]:
    """Each point of a grid: what tells it apart in a name, and its settings."""
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        label = " ".join(f"{key.rpartition('.')[2]}={_short(v)}" for key, v in point.items())
        yield label, to_words(point)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "_")


def _as_folder(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name).lower()


def words_of(settings: Settings, folder: Path, key: str) -> Words:
    """What is laid over one another, as options of ``fit``.

    Args:
        settings: Files, settings by dotted key, or both.
        folder: Where files are looked for, before the current folder.
        key: Where the settings stand, for errors.

    Raises:
        MissingFile: If a file is not there.
    """
    words: Words = []
    for part in settings if isinstance(settings, list) else [settings]:
        if isinstance(part, str):
            words += ["--config", _find(part, folder, key)]
        else:
            words += to_words(part)
    return words


def _find(name: str, folder: Path, key: str) -> str:
    for path in (folder / name, Path(name)):
        if os.path.isfile(path):  # also of what can be no name
            return str(path.resolve())
    name = name if len(name) <= 120 else f"{name[:120]} …"
    raise MissingFile(f"{key}: there is no file {name}, neither in {folder} nor here.")
