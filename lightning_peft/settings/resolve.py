"""Several files and options as one whole configuration, without running it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lightning_peft.errors import UserError
from lightning_peft.settings.arguments import show
from lightning_peft.settings.cli import PeftCLI, make_cli, plain
from lightning_peft.settings.diagnosis import shorten
from lightning_peft.settings.parser import make_data, make_module
from lightning_peft.settings.reading import read_yaml
from lightning_peft.settings.tree import assign


class Parsed(PeftCLI):
    """The command line up to where classes would be made."""

    def before_instantiate_classes(self) -> None:
        """Look for no folder and no checkpoint."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class Resolver:
    """Gives whole configurations from files and settings; the parser is made once."""

    def __init__(self) -> None:
        self._cli: PeftCLI | None = None

    def tree(self, words: list[str]) -> dict[str, Any]:
        """The configuration that ``lightning-peft fit`` would take from these words.

        Args:
            words: Options of ``fit``.

        Raises:
            UserError: In one sentence, if a key or a value is wrong.
        """
        late = [word for word in words if _is_late(word)]
        tree = self._parse([word for word in words if word not in late])
        if not late:
            return tree
        for word in late:
            key, _, value = word.removeprefix("--").partition("=")
            assign(tree, key, _value(key, value))
        with TemporaryDirectory() as folder:
            path = Path(folder) / "settings.yaml"
            path.write_text(yaml.safe_dump(tree))
            try:
                return self._parse(["--config", str(path)])
            except UserError as error:  # of a key that the user gave elsewhere
                raise UserError(str(error).replace(f"{path}: ", "")) from error

    def _parse(self, words: list[str]) -> dict[str, Any]:
        words = ["fit", *words]
        if self._cli is None:
            self._cli = make_cli(words, Parsed)
            parsed = self._cli.config
        else:
            parsed = self._cli.parser.parse_args(words)
        config = parsed["fit"].clone()
        config.pop("config", None)
        try:
            return plain(self._cli._parser("fit"), config)
        except (TypeError, ValueError) as error:
            reason = shorten(str(error))
            raise UserError(f"the configuration cannot be written to a file: {reason}") from error

    def module(self, tree: dict[str, Any]) -> Any:
        """The module of a configuration, its model not loaded.

        Args:
            tree: A whole configuration of ``fit``.

        Raises:
            UserError: As a constructor says it.
        """
        return make_module(tree["model"])

    def data(self, tree: dict[str, Any]) -> Any:
        """The data module of a configuration, nothing of its data read.

        Args:
            tree: A whole configuration of ``fit``.

        Raises:
            UserError: As a constructor says it.
        """
        return make_data(tree["data"])


def _value(key: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: {show(text)} is no value that YAML can read.") from error


def _is_late(word: str) -> bool:
    """Whether an option is better put into a file.

    On the command line jsonargparse does not take null for every type, and a class below another
    one (a gate, whose rank comes later) only as the last option.
    """
    key, _, value = word.partition("=")
    return value == "null" or (value.startswith("{") and key.count(".") > 1)
