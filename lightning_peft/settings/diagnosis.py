"""Which setting is wrong, in one sentence: which key, what was given, and what would do.

jsonargparse tells every type of a union that a value is not, over dozens of lines. Once it has
refused something, the settings are gone through here once more, file by file and word by word, and
the first that is wrong is named as the user wrote it.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import traceback
import types
from argparse import Action, ArgumentError
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

from lightning_peft.settings.tree import SPEC, Wrong, assign, merge, read_file, read_words

UNIONS = (Union, types.UnionType)


def diagnose(parser: ArgumentParser, words: list[str], folder: Path) -> str | None:
    """Find the first wrong setting.

    Args:
        parser: The command's parser.
        words: What follows the command.
        folder: Where relative paths begin.

    Returns:
        A sentence, or None if nothing is found.
    """
    actions = _actions(parser)
    tree: dict[str, Any] = {}
    for dest, action in actions.items():
        if "." not in dest and _bases(_hint(action)) and _class_of(action.default):
            tree[dest] = {"class_path": _class_of(action.default)}
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
    except Wrong as found:
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


def own_sentence(error: Exception, owners: dict[type, str]) -> str | None:
    """What a constructor said before jsonargparse wrapped it, with the key of its class.

    Args:
        error: What came out of the instantiation.
        owners: Classes and their keys, subclasses before their bases.

    Returns:
        The sentence; None if none of these classes raised it.
    """
    inner: BaseException = error
    while "\nErrors:\n" in str(inner) and inner.__cause__ is not None:
        inner = inner.__cause__
    for frame, _ in traceback.walk_tb(inner.__traceback__):
        key = next(
            (k for cls, k in owners.items() if isinstance(frame.f_locals.get("self"), cls)), None
        )
        if key is not None:
            text = " ".join(str(inner).split())
            return text if text.startswith(f"{key}.") else f"{key}: {text}"
    return None


# What a parser takes.


def _actions(parser: ArgumentParser) -> dict[str, Action]:
    no_setting = ("help", "config", "print_config")
    return {
        action.dest: action
        for action in parser._actions
        if action.dest not in no_setting and not action.dest.endswith(".help")
    }


@functools.cache
def _parameters(cls: type, skip: int) -> dict[str, Action]:
    """What a class takes, as jsonargparse sees it: with what it hands on to its bases."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip={skip} if skip else set())
    return _actions(parser)


def _hint(action: Action) -> Any:
    return getattr(action, "_typehint", None) or action.type


def _bases(hint: Any) -> list[tuple[type, int]]:
    """Classes that a type asks a subclass of, and how many arguments come from elsewhere."""
    if get_origin(hint) in UNIONS:
        return [base for part in get_args(hint) for base in _bases(part)]
    if get_origin(hint) is collections.abc.Callable:
        given = get_args(hint)[0]
        skip = len(given) if isinstance(given, list) else 0
        return [(base, skip) for base, _ in _bases(get_args(hint)[-1])]
    plain = ("builtins", "typing", "pathlib", "os", "datetime")
    return [(hint, 0)] if inspect.isclass(hint) and hint.__module__ not in plain else []


def _class_of(default: Any) -> str | None:
    """The class that stands where the user names none."""
    if default is None or isinstance(default, (str, int, float, list)):
        return None
    found = default.get("class_path") if hasattr(default, "get") else None
    return found if isinstance(found, str) else None


def _subclasses(base: type) -> dict[str, type]:
    found = {} if inspect.isabstract(base) else {base.__name__: base}
    sub: type
    for sub in base.__subclasses__():
        found.update(_subclasses(sub))
    return {name: cls for name, cls in found.items() if not name.startswith("_")}


def _shown(base: type) -> list[str]:
    """Names to choose from: the project's and the user's, or else the libraries'."""
    found = {name: cls for name, cls in _subclasses(base).items() if cls is not base}
    theirs = ("lightning.", "torch.", "transformers.", "accelerate.", "lightning_peft.commands.")
    ours = sorted(name for name, cls in found.items() if not cls.__module__.startswith(theirs))
    return ours or sorted(found)


def _resolve(key: str, name: str, base: type) -> Any:
    """The class of a name, which is short or a path."""
    short = name.rpartition(".")[2]
    classes = _subclasses(base)
    if "." not in name:
        if name in classes:
            return classes[name]
        hint = hint_at(name, classes, shown=_shown(base))
        raise Wrong(f"{key}: {name!r} is no {base.__name__}; {hint}")
    try:
        return getattr(importlib.import_module(name.rpartition(".")[0]), short)
    except (ImportError, AttributeError, ValueError) as error:
        near = difflib.get_close_matches(short, classes, n=1)
        also = f"; did you mean {near[0]}?" if near else "."
        raise Wrong(f"{key}: {name!r} cannot be imported ({error}){also}") from None


def hint_at(
    name: str, names: Iterable[str], before: str = "", shown: list[str] | None = None
) -> str:
    """The nearest of some names, or those to show if none is near.

    Args:
        name: As given.
        names: That there are.
        before: What stands before each.
        shown: Those to show; all when None.

    Returns:
        The end of a sentence.
    """
    names = sorted(set(names))
    parts = [part for part in name.lower().split("_") if part]
    initials = "".join(part[0] for part in parts)
    lower = {n.lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    # A rank is called r here, and a learning rate lr.
    near = near or [n for n in (*parts, initials) if n in lower]
    if near:
        return f"did you mean {before}{lower[near[0]]}?"
    return f"there are {', '.join((shown or names)[:30])}."


# Checking.


def _check_group(actions: dict[str, Action], values: dict[str, Any], dest: str, key: str) -> None:
    """Check settings against actions that begin with ``dest``, which users write as ``key``."""
    inside = {d[len(dest) :].split(".")[0] for d in actions if d.startswith(dest)}
    for name, value in values.items():
        if name not in inside:
            hint = hint_at(str(name), inside, key)
            raise Wrong(f"{key}{name} is unknown; {hint}")
        if any(d.startswith(f"{dest}{name}.") for d in actions):
            if isinstance(value, dict):
                _check_group(actions, value, f"{dest}{name}.", f"{key}{name}.")
        else:
            _check_value(actions[dest + name], value, key + name)


def _check_value(action: Action, value: Any, key: str) -> None:
    hint = _hint(action)
    bases = _bases(hint)
    if bases and isinstance(value, dict):
        _check_class(action, value, key)
    elif hint is not None and not _takes(hint, value):
        if bases and isinstance(value, str) and not _scalars(hint):
            if re.fullmatch(r"[\w.]+", value) and not Path(value).is_file():
                _check_class(action, {"class_path": value}, key)
        elif not isinstance(value, (dict, list)):
            raise Wrong(_no_good(hint, value, key))
    elif isinstance(value, str) and "str" in _scalars(hint) and not bases:
        with contextlib.suppress(yaml.YAMLError):
            if isinstance(read := yaml.safe_load(value), (dict, list)):
                raise Wrong(
                    f"{key} takes a text, but YAML reads {value!r} as {read!r}; put the text in "
                    "quotes of its own."
                )


def _check_class(action: Action, value: dict[str, Any], key: str) -> None:
    """Check ``class_path`` and ``init_args``, where the latter may be left out."""
    base, skip = _bases(_hint(action))[0]
    name = value.get("class_path") or _class_of(action.default)
    cls = base if name is None else _resolve(key, str(name), base)
    if not inspect.isclass(cls):
        return
    if not issubclass(cls, base):
        names = ", ".join(_shown(base))
        raise Wrong(f"{key}: {name!r} is no {base.__name__}; there are {names}.")
    beside = {k: v for k, v in value.items() if k not in SPEC}
    given = {**(value.get("init_args") or {}), **beside}
    known = _parameters(cls, skip)  # type: ignore[arg-type]
    for argument in given:
        if argument not in {dest.split(".")[0] for dest in known}:
            hint = hint_at(str(argument), known, f"{key}.")
            raise Wrong(f"{key}.{argument} is no argument of {cls.__name__}; {hint}")
    _check_group(known, given, "", f"{key}.")


def _check_missing(actions: dict[str, Action], tree: dict[str, Any]) -> None:
    """Check that model and data are there, with what their classes need."""
    for dest, action in actions.items():
        if "." in dest or not _bases(_hint(action)):
            continue
        base, skip = _bases(_hint(action))[0]
        # A group of options may be left out; model and data may not, whatever their hint says.
        if dataclasses.is_dataclass(base) and type(None) in get_args(_hint(action)):
            continue
        value = tree.get(dest)
        if value is None:
            names = ", ".join(_shown(base))
            raise Wrong(f"{dest} is missing: give --{dest} (one of {names}) or a --config with it.")
        value = value if isinstance(value, dict) else {"class_path": value}
        cls = _resolve(dest, str(value.get("class_path")), base)
        given = {*value, *(value.get("init_args") or {})}
        for name, parameter in inspect.signature(cls).parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and name not in given:
                raise Wrong(f"{dest}.{name} is missing: {cls.__name__} needs it.")


def _takes(hint: Any, value: Any) -> bool:
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


def _scalars(hint: Any) -> list[str]:
    parts = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    return [part.__name__ for part in parts if part in (bool, int, float, str)]


def _no_good(hint: Any, value: Any, key: str) -> str:
    parts = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    literals = [c for part in parts if get_origin(part) is Literal for c in get_args(part)]
    choices = list(dict.fromkeys(map(str, literals)))
    if choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        also = f"; did you mean {near[0]}?" if near else "."
        return f"{key}: {value!r} is none of {', '.join(choices)}{also}"
    names = _scalars(hint) or [getattr(p, "__name__", str(p)) for p in parts]
    return f"{key}: {value!r} is no {' or '.join(names)}."
