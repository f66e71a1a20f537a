"""Which setting is wrong, in one sentence: which key, what was given, and what would do.

jsonargparse tells every type of a union that a value is not, over dozens of lines. Once it has
refused something, the settings are gone through here once more, file by file and word by word, and
the first that is wrong is named as the user wrote it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_peft.errors import UserError
from lightning_peft.settings.arguments import actions_of, bases_of, default_class, hint_of
from lightning_peft.settings.checking import (
    Check,
    check_missing,
    check_spelling,
    refuse_no_group,
)
from lightning_peft.settings.reading import read_file
from lightning_peft.settings.tree import assign, merge, read_words


def diagnose(parser: ArgumentParser, words: list[str], folder: Path) -> str | None:
    """Find the first wrong setting.

    Args:
        parser: The command's parser.
        words: What follows the command.
        folder: Where relative paths begin.

    Returns:
        A sentence, or None if nothing is found.
    """
    actions = actions_of(parser)
    check = Check(folder)
    tree: dict[str, Any] = {}
    for dest, action in actions.items():
        if "." not in dest and bases_of(hint_of(action)) and default_class(action.default):
            tree[dest] = {"class_path": default_class(action.default)}
    file = ""
    try:
        for key, value in read_words(words, appends=True):
            file = ""
            if key == "config":
                content = read_file(value, folder)
                file = f"{value}: "
                check_spelling(content, "")
                merge(tree, content)
            else:
                assign(tree, key, value)
            check.group(actions, tree, "", "")
        file = ""
        check_missing(actions, tree)
    except UserError as found:
        return f"{file}{found}"
    return None


def diagnose_tree(parser: ArgumentParser, tree: dict[str, Any]) -> str | None:
    """Find the first wrong setting of a configuration that is read already.

    Args:
        parser: That refuses it.
        tree: The configuration.

    Returns:
        A sentence, or None if nothing is found.
    """
    actions = actions_of(parser)
    try:
        check_spelling(tree, "")
        Check(Path.cwd()).group(actions, tree, "", "")
        check_missing(actions, tree)
    except UserError as found:
        return str(found)
    return None


def refuse_ignored(parser: ArgumentParser, words: list[str], folder: Path) -> None:
    """Refuse what jsonargparse passes over: a group of keys that is a number, a list or null.

    Args:
        parser: The command's parser.
        words: What follows the command.
        folder: Where relative paths begin.

    Raises:
        UserError: Naming the file and the key.
    """
    actions = actions_of(parser)
    for key, file in read_words(words):
        if key == "config":
            for name, value in read_file(file, folder).items():
                if not isinstance(value, str):  # a file, which is read in its place
                    refuse_no_group(actions, value, f"{name}.", f"{file}: {name}")


def shorten(message: str) -> str:
    """Put jsonargparse's message into one line, without what every union adds to it.

    Args:
        message: The message.

    Returns:
        The keys that it goes through, and the reasons.
    """
    noise = "(- )?(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>)"
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    lines = [re.sub(r'Parser key "[^"]+":?', "", line).strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not re.match(noise, line)]
    text = " ".join(dict.fromkeys(kept))
    text = text if len(text) <= 400 else text[:400] + " …"
    return f"{keys}: {text}" if keys else text
