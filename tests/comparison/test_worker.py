"""A job says how it stands in a file of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.comparison import worker
from lightning_peft.comparison.worker import Task, read_result, work, write_result


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_result(tmp_path) == {}
    write_result(tmp_path, "fitted")
    assert read_result(tmp_path) == {"status": "fitted"}
    write_result(tmp_path, "failed", "why")
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "status": "failed",
        "reason": "why",
    }


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("out of\n  memory"), "out of memory"),
        (SystemExit(), "SystemExit"),
        (ValueError("x" * 500), "x" * 400 + " …"),
    ],
)
def test_whatever_happens_the_job_failed_for_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str
) -> None:
    def fail(task: Task) -> None:
        raise error

    def nothing(*args: Any) -> None:
        pass

    monkeypatch.setattr(worker, "_fit_and_test", fail)
    monkeypatch.setattr(worker.os, "dup2", nothing)  # the test's own output stays where it is
    monkeypatch.setattr(worker.signal, "signal", nothing)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work(Task(tmp_path / "job", {}, None, 1, None))
    assert read_result(tmp_path / "job") == {"status": "failed", "reason": reason}
