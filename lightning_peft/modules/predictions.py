"""Predictions as JSON lines, written as they come."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TextIO


class PredictionWriter:
    """Writes ``<task>.jsonl``, one line for each record, and scores what it writes.

    Each line holds index, prompt, output, extracted, expected and correct. The folder's
    ``protocol.json`` says how they were asked for.

    Args:
        folder: Where the files go; files of an earlier test there are overwritten.
        data: The data module, for ``protocol``, ``extract`` and ``correct``.
    """

    def __init__(self, folder: Path, data: Any) -> None:
        self.folder, self.data = folder, data
        self._files: dict[str, TextIO] = {}
        folder.mkdir(parents=True, exist_ok=True)
        protocol = json.dumps(dataclasses.asdict(data.protocol), indent=2, ensure_ascii=False)
        (folder / "protocol.json").write_text(protocol + "\n")

    def write(self, batch: dict[str, Any], outputs: list[str]) -> list[bool]:
        """Write a batch's answers.

        Args:
            batch: With ``task``, and lists ``index``, ``prompt`` and ``expected``.
            outputs: The generated texts.

        Returns:
            Which are correct.
        """
        task = batch["task"]
        if task not in self._files:
            path = self.folder / f"{task}.jsonl"
            self._files[task] = path.open("w", encoding="utf-8", buffering=1)
        correct = []
        rows = zip(batch["index"], batch["prompt"], outputs, batch["expected"], strict=True)
        for index, prompt, output, expected in rows:
            extracted = self.data.extract(output, task)
            correct.append(extracted is not None and self.data.correct(extracted, expected, task))
            line = {
                "index": index,
                "prompt": prompt,
                "output": output,
                "extracted": extracted,
                "expected": expected,
                "correct": correct[-1],
            }
            self._files[task].write(json.dumps(line, ensure_ascii=False) + "\n")
        return correct
