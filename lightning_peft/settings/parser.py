"""The commands' parser, whose errors are one sentence each, and modules from their settings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.errors import UserError
from lightning_peft.settings.diagnosis import diagnose, shorten


class FriendlyParser(LightningArgumentParser):
    """LightningCLI's parser, which raises a ``ValueError`` of one sentence where that one exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A key cut short is a mistake, and would pass as an abbreviation.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        # While jsonargparse reads a file, the current folder is that of the file.
        self._folder = Path.cwd()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong.

        Args:
            message: What jsonargparse says.
            ex: Where it comes from.

        Raises:
            UserError: With the sentence.
        """
        if not self.exit_on_error:  # a class's own parser, whose error another one catches
            super().error(message, ex)
        raise UserError(self._explain() or shorten(message)) from ex

    def _explain(self) -> str | None:
        words = list(self.args or ())
        commands = next((a.choices for a in self._actions if isinstance(a.choices, dict)), None)
        parser = self if commands is None else commands.get(words.pop(0) if words else None)
        try:
            return None if parser is None else diagnose(parser, words, self._folder)
        except Exception:  # the message at hand is better than an error about an error
            return None


@contextlib.contextmanager
def older_names() -> Iterator[None]:
    """Names whose newer ones older releases of jsonargparse, supported too, do not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(skip_none|instantiate_classes|JSONARGPARSE_DEPR)")
        yield


def make_module(part: Any) -> Any:
    """A module, its model not loaded.

    Args:
        part: What a configuration has under ``model``.

    Raises:
        UserError: As a constructor says it.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    with older_names():
        return parser.instantiate_classes(parser.parse_object({"model": part})).model
