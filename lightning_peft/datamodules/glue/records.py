"""GLUE's records, from the files as they are published or from the hub (``nyu-mll/glue``).

The tsv files differ from task to task: no csv quoting (MRPC has single quotation marks inside
fields), a byte-order mark before MRPC's header, no header in CoLA's, ten columns in STS-B's, words
for labels in RTE's, QNLI's and MNLI's. QQP's has rows that are broken by a missing tab or by a line
break inside a question: where only the tab before the label is missing, the row is mended; what
cannot be told is left out, as the hub's version does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_peft.datamodules.glue.tasks import QQP, TASKS, spelled
from lightning_peft.datamodules.loading.fields import listed, number_of
from lightning_peft.datamodules.loading.files import is_folder, listing, read_file, reason
from lightning_peft.datamodules.loading.labelled import Labelled
from lightning_peft.datamodules.loading.records import Source
from lightning_peft.errors import UserError, shown

HUB = "nyu-mll/glue"
ENDINGS = (".tsv", ".jsonl", ".parquet", "-*.parquet")


class GlueFiles:
    """One task's splits, in a folder or on the hub.

    Args:
        task: Its name in ``TASKS``.
        data_dir: The folder with the tasks' folders, or this task's own; None takes the hub.
        cache_dir: Where `datasets` keeps what it read; None takes its own place.

    Attributes:
        counts: After reading: how many records were ``mended``, and how many ``left_out``.
    """

    def __init__(self, task: str, data_dir: str | None, cache_dir: str | None = None) -> None:
        self.task, self.cache_dir = TASKS[task], cache_dir
        self.name = task
        self.folder = None if data_dir is None else self._find(Path(data_dir))
        self.counts = {"mended": 0, "left_out": 0}

    def _find(self, root: Path) -> Path:
        if not is_folder(root):
            raise UserError(
                f"data.data_dir {str(root)!r} is no folder; give the folder of GLUE's files, or "
                f"null for {HUB} of the hub."
            )
        found = [p for p in listing(root) if p.is_dir() and spelled(p.name) == self.name]
        return found[0] if found else root

    def there(self, names: tuple[str, ...]) -> bool:
        """Say whether a split is there under one of its names; on the hub all are."""
        return self.folder is None or bool(self._source(names).there(str(self.folder)))

    def missing(self, names: tuple[str, ...]) -> str:
        """Say in one sentence that a split is not there."""
        file = f"{names[0]}.tsv"
        return f"{self.folder} holds no {file} of {self.name} (nor a .jsonl or .parquet)."

    def read(self, names: tuple[str, ...]) -> list[Labelled]:
        """Read a split.

        Args:
            names: What its file may be called; the last but for ``sample`` is the hub's name.

        Returns:
            Its records.

        Raises:
            UserError: If it is not there or empty, or a record lacks a text or a label in range;
                with the file and the line.
        """
        source = self._source(names)
        if self.folder is None:
            return self._labelled(
                (f"record {n} of {HUB}/{self.name} ({source.split})", fields)
                for n, fields in enumerate(source.read(None, self.cache_dir), 1)
            )
        paths = source.there(str(self.folder))
        if not paths:
            raise UserError(self.missing(names))
        records = self._labelled(row for path in paths for row in self._rows(path))
        if not records:
            raise UserError(f"{paths[0]} holds no record.")
        return records

    def _source(self, names: tuple[str, ...]) -> Source:
        split = next(n for n in names if not n.startswith("dev"))
        files = tuple(f"{name}{ending}" for name in names for ending in ENDINGS)
        return Source(files, HUB, split, self.name, ("label",), self.task.fields)

    def _rows(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each record's place, and its fields under the hub's names."""
        if path.suffix != ".tsv":
            records = read_file(path, ("label",), self.task.fields)
            yield from ((f"record {n} of {path}", r) for n, r in enumerate(records, 1))
            return
        lines = enumerate(_lines(path), 1)
        columns = self.task.header
        if not columns or _cells(path)[: len(columns)] == list(columns):
            columns = tuple(next(lines, (0, ""))[1].split("\t"))
        lacking = [name for name in self.task.tsv if name not in columns]
        if lacking:
            raise UserError(
                f"{path}, line 1: the header has no column {lacking[0]!r}, only {listed(columns)}."
            )
        for number, line in lines:
            if not line:
                continue
            cells = self._whole(line.split("\t"), len(columns))
            if cells is None:
                self.counts["left_out"] += 1
                continue
            place = f"{path}, line {number}"
            if len(cells) != len(columns):
                raise UserError(f"{place}: {len(cells)} columns, where {len(columns)} are wanted.")
            row = dict(zip(columns, cells, strict=True))
            *texts, label = (row[name] for name in self.task.tsv)
            yield place, {**dict(zip(self.task.fields, texts, strict=True)), "label": label}

    def _whole(self, cells: list[str], count: int) -> list[str] | None:
        """The cells of a row; of QQP's mended where that is safe, None where not."""
        if self.task.header != QQP or len(cells) == count:
            return cells
        label = re.fullmatch(r"(.*\S)\s+([01])", cells[-1])
        if len(cells) == count - 1 and cells[0].isdigit() and label:
            self.counts["mended"] += 1
            return [*cells[:-1], *label.groups()]
        return None

    def _labelled(self, rows: Iterator[tuple[str, dict[str, Any]]]) -> list[Labelled]:
        records = []
        for index, (place, row) in enumerate(rows):
            first, second = [*(row[name] for name in self.task.fields), None][:2]
            if second is None and not first:
                raise UserError(f"{place}: the sentence is empty.")
            records.append(Labelled(first, second, self._label(row["label"], place), index))
        return records

    def _label(self, value: Any, place: str) -> int | float:
        names = self.task.labels
        if names is None:
            score = number_of(value)
            if score is not None and 0 <= score <= 5:
                return float(score)
            raise UserError(f"{place}: the score {shown(value)} is no number from 0 to 5.")
        known: dict[Any, int] = {name: i for i, name in enumerate(names)}
        known |= {str(i): i for i in range(len(names))}
        if str(value) not in known or isinstance(value, bool | float):
            words = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            hidden = "; GLUE hides those of its test sets" if str(value) == "-1" else ""
            raise UserError(f"{place}: the label {shown(value)} is none of {words}{hidden}.")
        return known[str(value)]


def _lines(path: Path) -> Iterator[str]:
    """Lines by line feeds alone: texts hold further characters that Python takes for breaks."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from (line.rstrip("\r\n") for line in file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}).") from error


def _cells(path: Path) -> list[str]:
    """The first line's cells."""
    return next(_lines(path), "").split("\t")
