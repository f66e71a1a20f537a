"""A run has a folder, goes on in it, and its errors are about keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_peft.callbacks import Checkpoints
from lightning_peft.errors import UserError
from lightning_peft.runs import AtomicCheckpointIO, RunLogger
from lightning_peft.settings.cli import PeftCLI, make_cli

TOP = "--trainer.callbacks.save_top_k=-3"
QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


class Made(PeftCLI):
    """Makes everything and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.chdir(tmp_path)

    def cli(*words: str, command: str = "fit", kind: type[PeftCLI] = Made) -> PeftCLI:
        small = ("--trainer.accelerator", "cpu", "--trainer.default_root_dir", "root")
        return make_cli([command, "--config", QUICKSTART, *small, *words], kind)

    return cli


def test_a_new_run_has_the_next_folder_its_logger_and_whole_checkpoints(
    make: Any, tmp_path: Path
) -> None:
    (tmp_path / "root" / "version_4").mkdir(parents=True)
    cli = make()
    folder = cli.place.folder
    assert folder == tmp_path / "root" / "version_5"
    assert folder.is_dir()  # so that no other run takes it
    assert isinstance(cli.trainer.logger, RunLogger)
    assert cli.trainer.log_dir == str(folder)
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    (checkpoints,) = (c for c in cli.trainer.callbacks if isinstance(c, Checkpoints))
    assert checkpoints.dirpath == str(folder / "checkpoints")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ckpt_path", "no.ckpt"], "ckpt_path: no.ckpt does not exist."),
        (["--ckpt_path", "last"], "no run under root has a checkpoint."),
        (["--model.adapter.p", "1"], r"^model.adapter: p must lie in \[0, 1\), got 1.0"),
        (["--data.batch_size", "0"], r"^data.batch_size is 0; it has to be 1 or more"),
        (["--checkpoint.every_n_train_steps", "-1"], r"^checkpoint: "),
        (["--importance.every_n_steps", "0"], r"^importance: every_n_steps must be at least 1"),
        (["--trainer.accelerator", "gpuu"], r"^trainer: You selected an invalid accelerator"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", TOP],
            "^trainer.callbacks: Invalid value for save",
        ),
    ],
)
def test_what_cannot_be_made_is_one_sentence(make: Any, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(*words)
    assert not Path("root").exists()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MisconfigurationException("two\n words"), r"^trainer: two words$"),
        (ValueError("`val_check_interval` (9) must be"), r"^trainer: `val_check_interval` \(9\)"),
        (RuntimeError("… EADDRINUSE …"), "by which the processes find each other, is in use"),
    ],
)
def test_what_a_run_says_of_the_trainer_is_the_users(
    make: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fit(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "fit", fit)
    words = ("--validate_first", "false")
    with pytest.raises(UserError, match=sentence) as caught:
        make(*words, kind=PeftCLI)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ValueError("`devices` of something else"), KeyError("x"), UserError("`max_steps`")]
)
def test_what_is_not_about_the_trainer_stays(
    make: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fit(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(type(error)) as caught:
        make("--validate_first", "false", kind=PeftCLI)
    assert caught.value is error


def test_a_start_that_fails_leaves_no_folder(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fit(self: Trainer, *args: Any, **kwargs: Any) -> None:
        assert (tmp_path / "root" / "version_0").is_dir()
        raise RuntimeError("no")

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(RuntimeError):
        make("--validate_first", "false", kind=PeftCLI)
    assert not (tmp_path / "root").exists()
