"""What a parser or a class takes: its arguments, their types, and whether a value is of one."""

from __future__ import annotations

import collections.abc
import copy
import difflib
import functools
import inspect
import json
import operator
import types
from argparse import Action, ArgumentError
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from lightning_peft.errors import UserError, shown
from lightning_peft.settings.names import shown_names
from lightning_peft.settings.reading import MODE

UNIONS = (Union, types.UnionType)
PLAIN = (bool, int, float, str, list, dict, set, tuple, type(None))


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
        if not get_args(hint):
            return []
        given = get_args(hint)[0]
        skip = len(given) if isinstance(given, list) else 0
        return [(base, skip) for base, _ in bases_of(get_args(hint)[-1])]
    plain = ("builtins", "typing", "pathlib", "os", "datetime", "collections.abc")
    return [(hint, 0)] if inspect.isclass(hint) and hint.__module__ not in plain else []


def default_class(default: Any) -> str | None:
    """The class that stands where the user names none."""
    if default is None or isinstance(default, (str, int, float, list)):
        return None
    found = default.get("class_path") if hasattr(default, "get") else None
    return found if isinstance(found, str) else None


def inner_of(hint: Any) -> Any:
    """The type of what a list, set or mapping holds; Any where the type names none.

    Args:
        hint: A type, or a union in which some are such containers.
    """
    found: list[Any] = []
    for part in parts_of(hint):
        origin, inner = get_origin(part), get_args(part)
        if inner and inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable):
            found.append(inner[-1] if issubclass(origin, collections.abc.Mapping) else inner[0])
    return functools.reduce(operator.or_, found) if found else Any


def has_mapping(hint: Any) -> bool:
    """Whether a mapping is of a type, or of one of a union's."""
    kinds = [get_origin(part) or part for part in parts_of(hint)]
    return any(inspect.isclass(k) and issubclass(k, collections.abc.Mapping) for k in kinds)


def parts_of(hint: Any) -> tuple[Any, ...]:
    """The types that a type is a union of, or itself alone."""
    if get_origin(hint) not in UNIONS:
        return (hint,)
    return tuple(inner for part in get_args(hint) for inner in parts_of(part))


def takes(hint: Any, value: Any) -> bool:
    """Whether a value, a word of the command line or a part of a file, is of a type."""
    if value is None:  # which jsonargparse would take for "not given"
        return not _is_known(hint) or type(None) in parts_of(hint)
    parser = ArgumentParser(exit_on_error=False, parser_mode=MODE)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, str):  # parsed, since a command line has strings only
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": copy.deepcopy(value)})
    except (ArgumentError, AttributeError, ImportError, KeyError, TypeError, ValueError):
        return False
    return True


def scalars(hint: Any) -> list[str]:
    """Names of the plain types among those that a type is a union of."""
    return [part.__name__ for part in parts_of(hint) if part in (bool, int, float, str)]


def no_good(hint: Any, value: Any, key: str) -> str:
    """The sentence that a value is not of its key's type."""
    parts = [part for part in parts_of(hint) if part is not type(None)]
    given = show(value)
    literals = [c for part in parts if get_origin(part) is Literal for c in get_args(part)]
    choices = list(dict.fromkeys(map(str, literals)))
    if choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        also = f"; did you mean {near[0]}?" if near else "."
        return f"{key}: {given} is none of {', '.join(choices)}{also}"
    names = scalars(hint) if isinstance(value, str) else []
    names = names or list(dict.fromkeys(map(_named, parts)))
    bases = [base for base, _ in bases_of(hint)]
    there = "" if scalars(hint) or not bases else f"; there are {', '.join(choose(bases))}"
    return f"{key}: {given} is no {' or '.join(names)}{there}."


def refuse_null(action: Action, value: Any, key: str) -> None:
    """Refuse null where a type does not have it, which jsonargparse takes for "not given".

    Raises:
        UserError: Naming the key.
    """
    if value is None and action.default is not None and not takes(hint_of(action), None):
        raise UserError(no_good(hint_of(action), None, key))


def _is_known(hint: Any) -> bool:
    """Whether a type says what is of it, as Any and one that cannot be resolved do not."""
    return all(part in PLAIN or get_origin(part) or bases_of(part) for part in parts_of(hint))


def show(value: Any) -> str:
    """A value as YAML would write it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return shown(value)


def choose(bases: list[type]) -> list[str]:
    """Names to choose from for one of some classes."""
    return sorted({name for base in bases for name in shown_names(base)})[:30]


def _named(part: Any) -> str:
    if isinstance(part, type(None)):
        return "null"
    bases = bases_of(part)
    if bases:
        return bases[0][0].__name__
    origin = get_origin(part)
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Mapping):
        return "mapping"
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable):
        inner = [_named(p) for p in parts_of(inner_of(part)) if p is not Any]
        return f"list of {' or '.join(inner)}" if inner else "list"
    return getattr(part, "__name__", str(part))
