"""A parser whose errors name the nearest right word."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser


class FriendlyParser(LightningArgumentParser):
    """LightningCLI's parser."""
