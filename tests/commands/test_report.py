"""A report is that of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.commands import report as command


def test_the_page_of_a_folder_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_peft.reports.report", lambda folder: f"page of {folder!r}")
    command.main(["runs/a/version_0"])
    assert capsys.readouterr().out == f"page of {Path('runs/a/version_0')!r}\n"


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder; give the log folder of a run"):
        command.main([str(tmp_path / "none")])
