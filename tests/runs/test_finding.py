"""The checkpoint that a command goes on from is the newest that can be used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_peft.errors import MissingFile
from lightning_peft.runs import find_last, find_restart

Save = Callable[..., Path]


def test_the_last_checkpoint_is_that_of_the_newest_run_by_steps(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "version_0/checkpoints/step=90.ckpt", 90)
    save(tmp_path / "version_1/checkpoints/best.ckpt", 5)
    last = save(tmp_path / "version_1/checkpoints/step=10.ckpt", 10)
    save(tmp_path / "version_1/checkpoints/step=9.ckpt", 9)
    (tmp_path / "version_2").mkdir()
    assert find_last(tmp_path) == last
    assert find_last(tmp_path / "version_1") == last


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, save: Save) -> None:
    good = save(tmp_path / "version_0/checkpoints/step=1.ckpt", 1)
    good.with_name("step=2.ckpt").write_bytes(b"PK\x03\x04abc")
    with pytest.warns(UserWarning, match="step=2.ckpt is cut off or damaged"):
        assert find_last(tmp_path) == good
    good.unlink()
    with (
        pytest.warns(UserWarning, match="cut off"),
        pytest.raises(MissingFile, match="ckpt_path: last was given, but no run under"),
    ):
        find_last(tmp_path)


def _list(path: Path) -> None:
    torch.save([1, 2], path)


def _other(path: Path) -> None:
    torch.save({"a": 1}, path)


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _flipped(path: Path) -> None:
    whole = bytearray(path.with_name("step=1.ckpt").read_bytes())
    whole[whole.index(torch.arange(6.0).numpy().tobytes()) + 2] ^= 4
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_list, "step=4.ckpt holds a list and no checkpoint"),
        (_other, "step=4.ckpt was not written by lightning_peft"),
        (Path.mkdir, "step=4.ckpt is a folder of shards"),
        (_loop, "step=4.ckpt does not exist"),
        (_flipped, "step=4.ckpt is cut off or damaged"),
    ],
)
def test_what_cannot_be_gone_on_from_is_named_and_the_one_before_serves(
    tmp_path: Path, save: Save, make: Callable[[Path], None], sentence: str
) -> None:
    good = save(tmp_path / "version_0/checkpoints/step=1.ckpt", 1)
    make(good.with_name("step=4.ckpt"))
    with pytest.warns(UserWarning, match=sentence):
        assert find_last(tmp_path) == good


def test_a_checkpoint_without_numbers_is_passed_over(tmp_path: Path, save: Save) -> None:
    good = save(tmp_path / "version_0/checkpoints/step=1.ckpt", 1)
    weights = {"model.q.lora_A": torch.full((2, 3), torch.nan)}
    save(good.with_name("step=2.ckpt"), 2, state_dict=weights)
    with pytest.warns(UserWarning, match="step=2.ckpt holds NaN"):
        assert find_last(tmp_path) == good


def test_a_job_that_was_started_again_goes_on_from_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    run = tmp_path / "runs" / "version_0"
    last = save(run / "checkpoints" / "step=2.ckpt", 2)
    (run / "config.yaml").touch()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert find_restart(run.parent, None) is None  # its first start
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_restart(run.parent, None) == last
    (run.parent / "version_1").mkdir()  # which this start has claimed already
    assert find_restart(run.parent, None) == last

    attempt = tmp_path / "errors" / "attempt_0"
    attempt.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt.with_name("attempt_1") / "0/e.json"))
    os.utime(run / "config.yaml", (1, 1))  # a run from before the job
    assert find_restart(run.parent, None) is None
