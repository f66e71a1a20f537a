"""Predictions as JSON lines: written as they come, taken up after an interruption, scored whole."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import distributed

from lightning_peft.atomic import alone_at, hold, is_held, write_text
from lightning_peft.errors import UserError, naming

Row = dict[str, Any]


class PredictionWriter:
    """Writes ``<task>.jsonl``, one line for each record in the order of the data.

    Each line holds index, prompt, output (a list of turns in a conversation), expected, and what
    the task's ``judge`` adds. While a test runs, every process appends to ``<task>.part<process>``;
    these become the final file when all is there, and a test of the same weights, records and
    protocol that finds them goes on after their last line. ``protocol.json`` says how answers were
    asked for: the protocol, and under ``tasks`` each task's ``records``, their ``fingerprint``, and
    where its own protocol differs.

    A test of a bare base or of an exported adapter has no run whose folder it could use: the
    command finds that of an interrupted one by `lightning_peft.runs.interrupted_test`.

    Args:
        folder: Where the files go; a finished test's files there are overwritten.
        data: The data module: ``protocol``, ``test_tasks``, ``test_stamp``, ``judge``, ``score``,
            ``write_answers``.
        weights: What is tested, to tell whether an interrupted test was the same.
        process: Which this is.
    """

    def __init__(self, folder: Path, data: Any, weights: str, process: int = 0) -> None:
        self.folder, self.data, self.process = folder, data, process
        self.rows: dict[str, dict[int, Row]] = defaultdict(dict)
        self._files: dict[str, TextIO] = {}
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        protocol = _as_read(dataclasses.asdict(data.protocol))
        # Also the time of the files: what has the same name may be other weights.
        files = [p for p in (Path(weights), *Path(weights).glob("*")) if p.is_file()]
        changed = max((p.stat().st_mtime for p in files), default=None)
        stamps = {task: _as_read(data.test_stamp(task)) for task in data.test_tasks}
        path = folder / "protocol.json"
        with alone_at(path):  # other tests may begin at the same moment
            for task, stamp in stamps.items():
                self._take_up(task, {"weights": weights, "changed": changed, **stamp})
            if process == 0:
                stamps = {**self._stamps_before(), **stamps}
                own = {task: _beyond(protocol, stamp) for task, stamp in stamps.items()}
                told = {**protocol, "tasks": own}
                write_text(path, json.dumps(told, indent=2, ensure_ascii=False) + "\n")

    def _stamps_before(self) -> dict[str, Row]:
        """The whole stamps of an earlier test's tasks, whose files are still in the folder."""
        path = self.folder / "protocol.json"
        known: Row = (_parsed(path.read_bytes()) if path.is_file() else None) or {}
        tasks = known.pop("tasks", {})
        there = {task for task in tasks if (self.folder / f"{task}.jsonl").is_file()}
        return {task: {**known, **own} for task, own in tasks.items() if task in there}

    def _take_up(self, task: str, stamp: Row) -> None:
        """Read what an interrupted test of the same things wrote, and open the file to go on."""
        path = self.folder / f"{task}.part{self.process}"
        if path.is_file() and is_held(path):
            raise UserError(
                f"{path} is being written by another test; wait for its end, or take another "
                "trainer.default_root_dir."
            )
        # Bytes: a kill may cut a character too, and texts have further kinds of line breaks.
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        if lines and _parsed(lines[0]) == _as_read(stamp):
            rows = [row for row in map(_parsed, lines[1:]) if row is not None]
            self.rows[task] = {row["index"]: row for row in rows}
        kept = [stamp, *self.rows[task].values()]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_text(path, text)
        self._files[task] = path.open("a", encoding="utf-8", buffering=1)
        hold(self._files[task])

    def unanswered(self, batch: Row) -> Row | None:
        """Leave out of a batch what is answered already; None where nothing is left."""
        done = self.rows[batch["task"]]
        left = [i for i, index in enumerate(batch["index"]) if index not in done]
        if len(left) == len(batch["index"]):
            return batch
        return {key: _selected(value, left) for key, value in batch.items()} if left else None

    def write(
        self,
        batch: Row,
        turns: Sequence[Sequence[str]],
        measured: Sequence[Row] | None = None,
    ) -> None:
        """Judge and write a batch's answers.

        Args:
            batch: With ``task``, and lists ``index``, ``prompt`` and ``expected``.
            turns: The generated texts, for each turn those of all records.
            measured: What else is known of each record.
        """
        task, rows = batch["task"], []
        for i, index in enumerate(batch["index"]):
            texts = [turn[i] for turn in turns]
            output = texts if len(texts) > 1 else texts[0]
            prompt, expected = batch["prompt"][i], batch["expected"][i]
            row = {"index": index, "prompt": prompt, "output": output, "expected": expected}
            rows.append({**row, **(measured[i] if measured else {})})
        self.add(task, rows)

    def add(self, task: str, rows: list[Row]) -> None:
        """Judge and write rows of a task, each with ``index``, ``output`` and ``expected``."""
        self.data.judge(task, rows)
        for row in rows:
            self.rows[task][row["index"]] = row
            with naming(self.folder / task):
                self._files[task].write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self, score: bool = True) -> dict[str, dict[str, float]]:
        """Gather all processes' rows, write the final files, and score each task.

        Args:
            score: Whether to score.

        Returns:
            Metrics by task and name; the same in every process.
        """
        for file in self._files.values():
            file.close()
        scores: dict[str, dict[str, float]] = {}
        for rows in _gathered(dict(self.rows)):
            for task, found in rows.items():
                self.rows[task] |= found
        predictions = {}
        for task in self.data.test_tasks:
            ordered = predictions[task] = [
                self.rows[task][index] for index in sorted(self.rows[task])
            ]
            if self.process == 0:
                self._replace_parts(task, ordered)
            if score and ordered:
                scores[task] = self.data.score(task, ordered)
        if self.process == 0:
            self.data.write_answers(self.folder, predictions)
        return scores

    def _replace_parts(self, task: str, rows: list[Row]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = self.folder / f"{task}.jsonl"
        write_text(path, text)
        for part in self.folder.glob(f"{task}.part*"):
            part.unlink()


def _as_read(row: Row) -> Row:
    """What is read back of a line that is written."""
    return json.loads(json.dumps(row))  # type: ignore[no-any-return]


def _beyond(protocol: Row, stamp: Row) -> Row:
    """What a task's stamp says that the protocol does not."""
    return {k: v for k, v in stamp.items() if k not in protocol or protocol[k] != v}


def _parsed(line: bytes) -> Any:
    """Read a line; None where a kill cut it off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _selected(value: Any, rows: list[int]) -> Any:
    if isinstance(value, torch.Tensor):
        return value[rows]
    return [value[i] for i in rows] if isinstance(value, list) else value


def _gathered(rows: dict[str, dict[int, Row]]) -> list[dict[str, dict[int, Row]]]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [rows]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, rows)
    return gathered
