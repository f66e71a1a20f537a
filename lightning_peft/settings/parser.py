"""The commands' parser, whose errors are one sentence each, and modules from their settings."""

from __future__ import annotations

import contextlib
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.errors import UserError
from lightning_peft.settings.diagnosis import diagnose, shorten
from lightning_peft.settings.keys import KEYS, Make, name_refusals, refusals_by_class


class FriendlyParser(LightningArgumentParser):
    """LightningCLI's parser, which raises a ``UserError`` of one sentence where that one exits."""

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

    def add_instantiator(
        self, instantiator: Make, class_type: type, *args: Any, **kwargs: Any
    ) -> None:
        """Add one that makes the objects of a class, and names its key where they are refused."""
        made = name_refusals(instantiator, class_type)
        with older_names():
            super().add_instantiator(made, class_type, *args, **kwargs)

    def name_keys(self) -> None:
        """Have the keys of all classes named where an object is refused.

        What is added for one of these classes later takes the place of what is added here.
        """
        for cls in KEYS:
            self.add_instantiator(_make, cls)

    def _explain(self) -> str | None:
        words = list(self.args or ())
        commands = next((a.choices for a in self._actions if isinstance(a.choices, dict)), None)
        parser = self if commands is None else commands.get(words.pop(0) if words else None)
        try:
            return None if parser is None else diagnose(parser, words, self._folder)
        except Exception:  # the message at hand is better than an error about an error
            return None


def _make(cls: type, *args: Any, **kwargs: Any) -> Any:
    return cls(*args, **kwargs)


@contextlib.contextmanager
def older_names() -> Iterator[None]:
    """Names whose newer ones older releases of jsonargparse, supported too, do not know."""
    with warnings.catch_warnings():
        older = "skip_none|instantiate_classes|add_instantiator|JSONARGPARSE_DEPR"
        warnings.filterwarnings("ignore", f"(?s).*({older})")
        yield


def make_module(part: Any) -> Any:
    """A module, its model not loaded.

    Args:
        part: What a configuration has under ``model``.

    Raises:
        UserError: If a key or value is wrong, or as a constructor says it.
    """
    return _make_part("model", LightningModule, part)


def make_data(part: Any) -> Any:
    """A data module, nothing of its data read.

    Args:
        part: What a configuration has under ``data``.

    Raises:
        UserError: As :func:`make_module`.
    """
    return _make_part("data", LightningDataModule, part)


def _make_part(key: str, cls: type, part: Any) -> Any:
    parser = FriendlyParser(exit_on_error=False)
    parser.add_subclass_arguments(cls, key)
    parser.name_keys()
    try:
        config = parser.parse_object({key: part})
    except ArgumentError as error:
        raise UserError(shorten(str(error))) from error
    with older_names(), refusals_by_class():
        return parser.instantiate_classes(config)[key]
