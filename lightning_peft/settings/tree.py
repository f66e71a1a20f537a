"""What the user gave: a command line's words and its files, as one tree of settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from lightning_peft.errors import UserError
from lightning_peft.settings.reading import read_file as read_file

SPEC = ("class_path", "init_args", "dict_kwargs")


def read_words(words: list[str], appends: bool = False) -> Iterator[tuple[str, str]]:
    """Keys and values of the command line in their order.

    Args:
        words: Of the command line.
        appends: Whether to give ``--key+=value`` too, its key with the plus.

    Raises:
        UserError: If a word belongs to no key, or a key has no value.
    """
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            raise UserError(f"{word!r} belongs to no option; options are written --key value.")
        key, given, value = word.partition("=")
        if not given:
            if not words or words[0].startswith("--"):
                raise UserError(f"{key} needs a value.")
            value = words.pop(0)
        key = "config" if key == "-c" else key.lstrip("-")
        if not key.endswith(".help") and (appends or not key.endswith("+")):
            yield key, value


def merge(tree: dict[str, Any], new: dict[str, Any]) -> None:
    """Put a file's settings over those before it, as jsonargparse does."""
    for key, value in new.items():
        old = tree.get(key)
        if "." in str(key):
            assign(tree, key, value)
        elif isinstance(old, dict) and isinstance(value, dict):
            if _changes_class(old, value.get("class_path")):
                old.pop("init_args", None)
            merge(old, value)
        else:
            tree[key] = value


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put one setting, written without ``init_args``, to its place.

    Args:
        tree: Settings as a file holds them.
        key: Dotted; with a plus at its end the value is one more of a list.
        value: Its new value.
    """
    *path, last = key.removesuffix("+").split(".")
    node = tree
    for name in path:
        child = _inner(node, name).get(name)
        if isinstance(child, list) and child:  # what follows is about the last of it
            if isinstance(child[-1], str):
                child[-1] = {"class_path": child[-1]}
            child = child[-1]
            if isinstance(child, dict):
                node = child
                continue
        if not isinstance(child, dict):
            child = {"class_path": child} if isinstance(child, str) else {}
        _inner(node, name)[name] = child
        node = child
    place = _inner(node, last)
    old = place.get(last)
    if key.endswith("+"):
        before = old if isinstance(old, list) else [] if old is None else [old]
        place[last] = [*before, value]
    elif isinstance(value, str) and isinstance(old, dict) and "class_path" in old:
        if _changes_class(old, value):
            place[last] = value
    else:
        place[last] = value


def _inner(node: dict[str, Any], name: str) -> dict[str, Any]:
    if "class_path" not in node or name in SPEC:
        return node
    if not isinstance(node.get("init_args"), dict):
        node["init_args"] = {}
    return node["init_args"]


def _changes_class(old: dict[str, Any], name: Any) -> bool:
    before = old.get("class_path")
    return bool(name) and bool(before) and str(name).split(".")[-1] != str(before).split(".")[-1]


def to_words(settings: dict[str, Any]) -> list[str]:
    """Settings by dotted key as options; shorter keys come first, and with them classes.

    Args:
        settings: Values by key; a mapping without ``class_path`` is a level of keys.
    """
    flat = dict(_flatten(settings, ""))
    return [
        f"--{key}={flat[key] if isinstance(flat[key], str) else _text(flat[key])}"
        for key in sorted(flat, key=lambda key: key.count("."))
    ]


def _text(value: Any) -> str:
    """A value as YAML reads it again: JSON, but for numbers that JSON does not have."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:  # .inf and .nan
        return (
            yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
            .split("\n...")[0]
            .strip()
        )


def _flatten(settings: dict[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            yield from _flatten(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
