"""A command's checkpoint is found, and its folder claimed or held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.errors import MissingFile, UserError
from lightning_peft.runs import find_place
from lightning_peft.runs.folders import RunFolder

Save = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, save: Save) -> Path:
    """A run with a checkpoint, under ``tmp_path``."""
    save(tmp_path / "version_0" / "checkpoints" / "step=4.ckpt", 4)
    (tmp_path / "version_0" / "config.yaml").touch()
    return tmp_path / "version_0"


def test_a_new_fit_claims_the_next_folder(run: Path) -> None:
    place = find_place("fit", run.parent, None)
    assert (place.folder, place.checkpoint) == (run.parent / "version_1", None)
    assert place.folder.is_dir()
    place.give_up()
    assert not place.folder.exists()


def test_a_resumed_fit_goes_on_in_its_folder(run: Path) -> None:
    place = find_place("fit", run.parent, "last")
    assert (place.folder, place.checkpoint) == (run, run / "checkpoints" / "step=4.ckpt")
    place.give_up()
    assert place.checkpoint.is_file()


@pytest.mark.parametrize(("command", "trial"), [("validate", False), ("fit", True)])
def test_what_leaves_nothing_claims_nothing(run: Path, command: str, trial: bool) -> None:
    place = find_place(command, run.parent, None, trial)
    assert place.held is None
    assert [p.name for p in run.parent.iterdir()] == ["version_0"]


def test_a_test_of_a_run_uses_its_folder_and_another_one_of_its_own(run: Path, save: Save) -> None:
    place = find_place("test", run.parent, str(run / "checkpoints" / "step=4.ckpt"))
    assert place.folder == run
    place.release()
    other = save(run.parent / "other" / "mine.ckpt", 1)
    place = find_place("test", run.parent, str(other))
    assert (place.folder, place.checkpoint) == (run.parent / "version_1", other)
    place.give_up()


def test_another_process_of_a_job_claims_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_place("fit", run.parent, None).folder == run.parent / "version_1"
    assert not (run.parent / "version_1").exists()


@pytest.mark.parametrize(
    ("command", "given"), [("fit", "last"), ("test", "last"), ("fit", "step=4.ckpt")]
)
def test_a_run_at_work_is_refused(run: Path, at_work: Any, command: str, given: str) -> None:
    path = given if given == "last" else str(run / "checkpoints" / given)
    with at_work(run), pytest.raises(UserError, match="version_0 is at work in process"):
        find_place(command, run.parent, path)
    find_place(command, run.parent, path).release()


def test_a_checkpoint_that_its_process_wrote_last_is_taken(
    run: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was at work when the checkpoint was looked for, and had ended when it was held."""
    init = RunFolder.__init__

    def held_later(self: RunFolder, path: Path, **options: bool) -> None:
        save(run / "checkpoints" / "step=8.ckpt", 8)
        init(self, path, **options)

    monkeypatch.setattr(RunFolder, "__init__", held_later)
    place = find_place("fit", run.parent, "last")
    assert place.checkpoint == run / "checkpoints" / "step=8.ckpt"
    place.release()


def test_what_is_no_checkpoint_is_said_before_anything_is_made(run: Path) -> None:
    with pytest.raises(MissingFile, match=r"^ckpt_path: no.ckpt does not exist\.$"):
        find_place("fit", run.parent, "no.ckpt")
    (run / "checkpoints" / "step=4.ckpt").write_bytes(b"no")
    with pytest.raises(UserError, match="cut off or damaged"):
        find_place("test", run.parent, str(run / "checkpoints" / "step=4.ckpt"))
    assert [p.name for p in run.parent.iterdir()] == ["version_0"]
