"""What a parser or a class takes: its arguments, their types, and whether a value is of one."""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import types
from argparse import Action, ArgumentError
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

UNIONS = (Union, types.UnionType)


def actions_of(parser: ArgumentParser) -> dict[str, Action]:
    """The settings of a parser by key, without those that only do something."""
    no_setting = ("help", "config", "print_config")
    return {
        action.dest: action
        for action in parser._actions
        if action.dest not in no_setting and not action.dest.endswith(".help")
    }


@functools.cache
def arguments_of(cls: type, skip: int) -> dict[str, Action]:
    """What a class takes, as jsonargparse sees it: with what it hands on to its bases."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip={skip} if skip else set())
    return actions_of(parser)


def hint_of(action: Action) -> Any:
    """The type that a setting has to be of."""
    return getattr(action, "_typehint", None) or action.type


def bases_of(hint: Any) -> list[tuple[type, int]]:
    """Classes that a type asks a subclass of, and how many arguments come from elsewhere."""
    if get_origin(hint) in UNIONS:
        return [base for part in get_args(hint) for base in bases_of(part)]
    if get_origin(hint) is collections.abc.Callable:
        given = get_args(hint)[0]
        skip = len(given) if isinstance(given, list) else 0
        return [(base, skip) for base, _ in bases_of(get_args(hint)[-1])]
    plain = ("builtins", "typing", "pathlib", "os", "datetime")
    return [(hint, 0)] if inspect.isclass(hint) and hint.__module__ not in plain else []


def default_class(default: Any) -> str | None:
    """The class that stands where the user names none."""
    if default is None or isinstance(default, (str, int, float, list)):
        return None
    found = default.get("class_path") if hasattr(default, "get") else None
    return found if isinstance(found, str) else None


def takes(hint: Any, value: Any) -> bool:
    """Whether a value, a word of the command line or a part of a file, is of a type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, str):  # parsed, since a command line has strings only
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError):
        return False
    return True


def scalars(hint: Any) -> list[str]:
    """Names of the plain types among those that a type is a union of."""
    parts = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    return [part.__name__ for part in parts if part in (bool, int, float, str)]


def no_good(hint: Any, value: Any, key: str) -> str:
    """The sentence that a value is not of its key's type."""
    parts = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    literals = [c for part in parts if get_origin(part) is Literal for c in get_args(part)]
    choices = list(dict.fromkeys(map(str, literals)))
    if choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        also = f"; did you mean {near[0]}?" if near else "."
        return f"{key}: {value!r} is none of {', '.join(choices)}{also}"
    names = scalars(hint) or [getattr(p, "__name__", str(p)) for p in parts]
    return f"{key}: {value!r} is no {' or '.join(names)}."
