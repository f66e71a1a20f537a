"""The commands' parser, whose errors are one sentence each, and modules from their settings."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.errors import UserError
from lightning_peft.settings.classes import check_classes
from lightning_peft.settings.diagnosis import diagnose, diagnose_tree, refuse_ignored, shorten
from lightning_peft.settings.keys import KEYS, Make, name_refusals, refusals_by_class
from lightning_peft.settings.reading import MODE, refuse_endless_words


class FriendlyParser(LightningArgumentParser):
    """LightningCLI's parser, which raises a ``UserError`` of one sentence where that one exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A key cut short is a mistake, and would pass as an abbreviation.
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("parser_mode", MODE)
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

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse words, and refuse classes that do not belong where they stand.

        Raises:
            UserError: With the sentence.
        """
        if not self.exit_on_error or hasattr(self, "parent_parser"):  # a part of another one's work
            return super().parse_args(*args, **kwargs)
        words = args[0] if args else kwargs.get("args")
        words = list(sys.argv[1:] if words is None else words)
        refuse_endless_words(words)
        with _crashes(self):
            parsed = super().parse_args(*args, **kwargs)
            self._refuse_ignored(words)
        for command, parser in self._commands().items():
            if parsed.get(command) is not None:
                check_classes(parser, parsed[command])
        return parsed

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
        words, commands = list(self.args or ()), self._commands()
        parser: Any = commands.get(words.pop(0) if words else "") if commands else self
        try:
            return None if parser is None else diagnose(parser, words, self._folder)
        except Exception:  # the message at hand is better than an error about an error
            return None

    def _refuse_ignored(self, words: list[str]) -> None:
        """Refuse a number or a list where a file should have a group of keys: it passes unread."""
        for command, parser in self._commands().items():
            if words[:1] == [command]:
                refuse_ignored(parser, words[1:], self._folder)

    def _commands(self) -> dict[str, Any]:
        """The parsers of commands by name; none where this is the parser of one."""
        return next((a.choices for a in self._actions if isinstance(a.choices, dict)), {})


@contextlib.contextmanager
def _crashes(parser: FriendlyParser) -> Iterator[None]:
    """Within, whatever jsonargparse stumbles over is about what the user gave."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        parser.error(str(error) or type(error).__name__, error)


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
        config = parser.parse_object({key: copy.deepcopy(part)})
    except Exception as error:  # jsonargparse stumbles in many ways over what it does not expect
        said = diagnose_tree(parser, {key: part})
        raise UserError(said or shorten(str(error))) from error
    check_classes(parser, config)
    with older_names(), refusals_by_class():
        return parser.instantiate_classes(config)[key]


def _read_local_files_only() -> None:
    """Have jsonargparse fetch no configuration from the net, and import no module of Python's.

    LightningCLI lets it read whatever fsspec reads. Older releases have other names for the one,
    and not the other, which is refused before anything is made in any case.
    """
    with older_names():
        try:
            set_up: Any = jsonargparse.set_parsing_settings  # type: ignore[attr-defined]
            set_up(
                config_read_mode_urls_enabled=False,
                config_read_mode_fsspec_enabled=False,
                import_path_denylist=sorted(sys.stdlib_module_names),
            )
        except (AttributeError, TypeError):
            jsonargparse.set_config_read_mode(urls_enabled=False, fsspec_enabled=False)  # type: ignore[attr-defined]


_read_local_files_only()
