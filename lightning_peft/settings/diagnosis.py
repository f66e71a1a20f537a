"""Which setting is wrong, in one sentence: which key, what was given, and what would do.

jsonargparse tells every type of a union that a value is not, over dozens of lines. Once it has
refused something, the settings are gone through here once more, file by file and word by word, and
the first that is wrong is named as the user wrote it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from argparse import Action
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser

from lightning_peft.errors import UserError
from lightning_peft.settings.arguments import (
    actions_of,
    arguments_of,
    bases_of,
    default_class,
    hint_of,
    no_good,
    scalars,
    takes,
)
from lightning_peft.settings.names import find_class, hint_at, shown_names
from lightning_peft.settings.tree import SPEC, assign, merge, read_file, read_words


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
    tree: dict[str, Any] = {}
    for dest, action in actions.items():
        if "." not in dest and bases_of(hint_of(action)) and default_class(action.default):
            tree[dest] = {"class_path": default_class(action.default)}
    file = ""
    try:
        for key, value in read_words(words):
            file = ""
            if key == "config":
                content = read_file(value, folder)
                file = f"{value}: "
                merge(tree, content)
            else:
                assign(tree, key, value)
            _check_group(actions, tree, "", "")
        file = ""
        _check_missing(actions, tree)
    except UserError as found:
        return f"{file}{found}"
    return None


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
    text = " ".join(kept)
    text = text if len(text) <= 400 else text[:400] + " …"
    return f"{keys}: {text}" if keys else text


def _check_group(actions: dict[str, Action], values: dict[str, Any], dest: str, key: str) -> None:
    """Check settings against actions that begin with ``dest``, which users write as ``key``."""
    inside = {d[len(dest) :].split(".")[0] for d in actions if d.startswith(dest)}
    for name, value in values.items():
        if name not in inside:
            hint = hint_at(str(name), inside, key)
            raise UserError(f"{key}{name} is unknown; {hint}")
        if any(d.startswith(f"{dest}{name}.") for d in actions):
            if isinstance(value, dict):
                _check_group(actions, value, f"{dest}{name}.", f"{key}{name}.")
        else:
            _check_value(actions[dest + name], value, key + name)


def _check_value(action: Action, value: Any, key: str) -> None:
    hint = hint_of(action)
    bases = bases_of(hint)
    if bases and isinstance(value, dict):
        _check_class(action, value, key)
    elif hint is not None and not takes(hint, value):
        if bases and isinstance(value, str) and not scalars(hint):
            if re.fullmatch(r"[\w.]+", value) and not Path(value).is_file():
                _check_class(action, {"class_path": value}, key)
        elif not isinstance(value, (dict, list)):
            raise UserError(no_good(hint, value, key))
    elif isinstance(value, str) and "str" in scalars(hint) and not bases:
        with contextlib.suppress(yaml.YAMLError):
            if isinstance(read := yaml.safe_load(value), (dict, list)):
                raise UserError(
                    f"{key} takes a text, but YAML reads {value!r} as {read!r}; put the text in "
                    "quotes of its own."
                )


def _check_class(action: Action, value: dict[str, Any], key: str) -> None:
    """Check ``class_path`` and ``init_args``, where the latter may be left out."""
    base, skip = bases_of(hint_of(action))[0]
    name = value.get("class_path") or default_class(action.default)
    cls = base if name is None else find_class(key, str(name), base)
    if not inspect.isclass(cls):
        return
    if not issubclass(cls, base):
        names = ", ".join(shown_names(base))
        raise UserError(f"{key}: {name!r} is no {base.__name__}; there are {names}.")
    beside = {k: v for k, v in value.items() if k not in SPEC}
    given = {**(value.get("init_args") or {}), **beside}
    known = arguments_of(cls, skip)  # type: ignore[arg-type]
    for argument in given:
        if argument not in {dest.split(".")[0] for dest in known}:
            hint = hint_at(str(argument), known, f"{key}.")
            raise UserError(f"{key}.{argument} is no argument of {cls.__name__}; {hint}")
    _check_group(known, given, "", f"{key}.")


def _check_missing(actions: dict[str, Action], tree: dict[str, Any]) -> None:
    """Check that model and data are there, with what their classes need."""
    for dest, action in actions.items():
        if "." in dest or not bases_of(hint_of(action)):
            continue
        base, skip = bases_of(hint_of(action))[0]
        # A group of options may be left out; model and data may not, whatever their hint says.
        if dataclasses.is_dataclass(base) and type(None) in get_args(hint_of(action)):
            continue
        value = tree.get(dest)
        if value is None:
            names = ", ".join(shown_names(base))
            raise UserError(
                f"{dest} is missing: give --{dest} (one of {names}) or a --config with it."
            )
        value = value if isinstance(value, dict) else {"class_path": value}
        cls = find_class(dest, str(value.get("class_path")), base)
        given = {*value, *(value.get("init_args") or {})}
        for name, parameter in inspect.signature(cls).parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and name not in given:
                raise UserError(f"{dest}.{name} is missing: {cls.__name__} needs it.")
