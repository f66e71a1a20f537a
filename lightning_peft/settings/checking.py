"""Settings against the types of their keys: the first that is wrong is named as it was written."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from argparse import Action
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from lightning_peft.errors import UserError, named
from lightning_peft.settings.arguments import (
    arguments_of,
    bases_of,
    choose,
    default_class,
    has_mapping,
    hint_of,
    inner_of,
    no_good,
    scalars,
    show,
    takes,
)
from lightning_peft.settings.names import find_class, hint_at, shown_names
from lightning_peft.settings.reading import is_file, read_file, read_yaml
from lightning_peft.settings.tree import SPEC


@dataclass(frozen=True)
class Check:
    """Goes through settings, and raises a ``UserError`` at the first that is wrong.

    Attributes:
        folder: Where the files begin that stand in the place of settings.
    """

    folder: Path

    def group(
        self, actions: dict[str, Action], values: dict[str, Any], dest: str, key: str
    ) -> None:
        """Check settings against actions that begin with ``dest``, which users write as ``key``."""
        inside = {d[len(dest) :].split(".")[0] for d in actions if d.startswith(dest)}
        for name, value in values.items():
            if name not in inside:
                hint = hint_at(str(name), inside, key)
                raise UserError(f"{key}{named(name)} is unknown; {hint}")
            if any(d.startswith(f"{dest}{name}.") for d in actions):
                if isinstance(value, str):
                    of_file = self._is_file(value)
                    value = self._read(value, key + name) if of_file else _opened(value)
                refuse_no_group(actions, value, f"{dest}{name}.", f"{key}{name}")
                self.group(actions, value, f"{dest}{name}.", f"{key}{name}.")
            else:
                action = actions[dest + name]
                self.value(hint_of(action), value, key + name, action.default)

    def value(self, hint: Any, value: Any, key: str, default: Any = ...) -> None:
        """Check one setting against its type."""
        if value is None and default is None:
            return
        bases, inside = bases_of(hint), inner_of(hint)
        if bases and isinstance(value, str) and self._is_file(value) and not scalars(hint):
            value = self._read(value, key)
        if (bases or inside is not Any) and isinstance(value, str):
            value = _opened(value)
        if bases and isinstance(value, dict):
            self._class(bases, default_class(default), value, key)
        elif bases and dataclasses.is_dataclass(bases[0][0]) and value is not None:
            refuse_no_group(arguments_of(*bases[0]), value, "", key)
        elif isinstance(value, list) and bases_of(inside):
            for inner in value:
                if isinstance(inner, str) and _opened(inner) is not inner:
                    raise UserError(no_good(inside, inner, key))  # a text, though of a mapping
                self.value(inside, inner, key)
        elif hint is not None and not takes(hint, value):
            if isinstance(value, dict) and has_mapping(hint) and inside is not Any:
                for name, inner in value.items():
                    self.value(inside, inner, f"{key}.{name}")
            names = isinstance(value, str) and re.fullmatch(r"[\w.]+", value)
            if bases and names and not scalars(hint):
                self._class(bases, None, {"class_path": value}, key)
            else:
                raise UserError(no_good(hint, value, key))
        elif isinstance(value, str) and "str" in scalars(hint) and not bases:
            _check_text(value, key)

    def _class(
        self, bases: list[tuple[type, int]], default: str | None, value: dict[str, Any], key: str
    ) -> None:
        """Check ``class_path`` and ``init_args``, where the latter may be left out."""
        name = value.get("class_path", default)
        cls: Any = bases[0][0]
        if "class_path" in value or name is not None:
            if not isinstance(name, str):
                there = ", ".join(choose([base for base, _ in bases]))
                raise UserError(
                    f"{key}.class_path: {show(name)} names no class; there are {there}."
                )
            cls = find_class(key, name, *(base for base, _ in bases))
        for part in ("init_args", "dict_kwargs"):
            if not isinstance(value.get(part) or {}, dict):
                raise UserError(
                    f"{key}.{part}: {show(value[part])} is no mapping of keys to values."
                )
        fitting = [s for base, s in bases if inspect.isclass(cls) and issubclass(cls, base)]
        if not fitting:
            kinds = " or ".join(dict.fromkeys(base.__name__ for base, _ in bases))
            also = "" if inspect.isclass(cls) else " (it is a function, no class)"
            names = ", ".join(choose([base for base, _ in bases]))
            raise UserError(f"{key}: {name!r} is no {kinds}{also}; there are {names}.")
        self._arguments(cls, fitting[0], value, key)

    def _arguments(self, cls: type, skip: int, value: dict[str, Any], key: str) -> None:
        beside = {k: v for k, v in value.items() if k not in SPEC}
        given = {**(value.get("init_args") or {}), **beside}
        known = arguments_of(cls, skip)
        for argument in given:
            if argument not in {dest.split(".")[0] for dest in known}:
                hint = hint_at(str(argument), known, f"{key}.")
                raise UserError(f"{key}.{named(argument)} is no argument of {cls.__name__}; {hint}")
        self.group(known, given, "", f"{key}.")

    def _is_file(self, value: str) -> bool:
        return is_file(self.folder / value)

    def _read(self, value: str, key: str) -> dict[str, Any]:
        content = read_file(value, self.folder, key)
        check_spelling(content, f"{key}.")
        return content


def refuse_no_group(actions: dict[str, Action], value: Any, dest: str, key: str) -> None:
    """Refuse a value that stands where a group of keys does.

    Args:
        actions: The settings that there are, by key.
        value: What stands there.
        dest: How the keys of the group begin among them.
        key: How users write the group.

    Raises:
        UserError: Naming the group and its keys.
    """
    below = sorted(d.split(".")[-1] for d in actions if d.startswith(dest))
    if below and not isinstance(value, dict):
        raise UserError(
            f"{key}: {show(value)} is no mapping of keys to values; its keys are "
            f"{', '.join(below[:30])}."
        )


def check_spelling(values: dict[str, Any], key: str) -> None:
    """Refuse arguments that stand beside a class's name, where jsonargparse takes none.

    Args:
        values: Settings as a file holds them.
        key: What stands before their keys.

    Raises:
        UserError: Naming the first.
    """
    for name, value in values.items():
        if not isinstance(value, dict):
            continue
        beside = [k for k in value if k not in (*SPEC, "__path__")]
        if isinstance(value.get("class_path"), str) and beside:
            raise UserError(
                f"{key}{name}.{beside[0]} stands beside class_path; a class's arguments stand "
                "below init_args."
            )
        check_spelling(value, f"{key}{name}." if name != "init_args" else key)


def _opened(value: str) -> Any:
    """A list or mapping that is written as one word, as on the command line; others as they are."""
    if value[:1] in "{[":
        with contextlib.suppress(yaml.YAMLError):
            return read_yaml(value)
    return value


def _check_text(value: str, key: str) -> None:
    with contextlib.suppress(yaml.YAMLError):
        if isinstance(read := read_yaml(value), (dict, list)):
            raise UserError(
                f"{key} takes a text, but YAML reads {value!r} as {read!r}; put the text in "
                "quotes of its own."
            )


def check_missing(actions: dict[str, Action], tree: dict[str, Any]) -> None:
    """Check that model and data are there, with what their classes need.

    Args:
        actions: Of the parser.
        tree: All settings.

    Raises:
        UserError: Naming the first that is missing.
    """
    for dest, action in actions.items():
        if "." in dest or not bases_of(hint_of(action)):
            continue
        base = bases_of(hint_of(action))[0][0]
        # A group of options may be left out; model and data may not, whatever their hint says.
        if dataclasses.is_dataclass(base) and type(None) in get_args(hint_of(action)):
            continue
        value = tree.get(dest)
        if value is None:
            names = ", ".join(shown_names(base))
            raise UserError(
                f"{dest} is missing: give --{dest} (one of {names}) or a --config with it."
            )
        value = _opened(value) if isinstance(value, str) else value
        value = value if isinstance(value, dict) else {"class_path": value}
        cls = find_class(dest, str(value.get("class_path")), base)
        given = {**value, **(value.get("init_args") or {})}
        for name, parameter in inspect.signature(cls).parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and given.get(name) is None:
                raise UserError(f"{dest}.{name} is missing: {cls.__name__} needs it.")
