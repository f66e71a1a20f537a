"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with a run's folder around it."""

from __future__ import annotations

from lightning_peft import distributed
from lightning_peft.engines.processes import forget_earlier_starts, watch_first
from lightning_peft.settings.cli import PeftCLI, make_cli


def main(words: list[str]) -> None:
    """Parse the words of one command and run it.

    Args:
        words: The command and its options.
    """
    forget_earlier_starts()
    with watch_first():
        make_cli(words, PeftCLI)
        distributed.leave()  # one that is behind still has to be sent the last of it
