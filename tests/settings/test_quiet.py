"""What every run would say is not said; the rest is."""

from __future__ import annotations

import logging
import warnings

import pytest

from lightning_peft.settings.quiet import quieten


def test_tips_and_seeds_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        quieten()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("💡 Tip: try this")
        logger.info("Seed set to 3")
        logger.info("run folder: x")
    assert caplog.messages == ["run folder: x"]


def test_a_resumed_runs_folder_is_no_reason_to_warn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quieten()
        warnings.warn("Checkpoint directory /x exists and is not empty.", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]
