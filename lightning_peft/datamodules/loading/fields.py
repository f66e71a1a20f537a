"""What a field of a record holds: a text where a text belongs, or one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from lightning_peft.errors import UserError, named, shown

MOST_NAMES = 20
_NUMBER = re.compile(r"\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?\s*", re.ASCII)


def text_in(record: Mapping[str, Any], field: str, place: str) -> str:
    """Return the text in a field.

    Args:
        record: The record.
        field: The field's name.
        place: Names the record in the sentence.

    Raises:
        UserError: If there is none, or something else.
    """
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(f"{place} {no_text(field, value)}.")
    return value


def text_if_any(record: Mapping[str, Any], field: str, place: str) -> str | None:
    """Return the text in a field that may be empty; raises as `text_in` does for anything else."""
    return None if record.get(field) is None else text_in(record, field, place)


def texts_in(value: Any, field: str, place: str) -> list[str]:
    """Return a list of texts, or refuse anything else as `text_in` does.

    Args:
        value: What the field holds.
        field: The field's name.
        place: Names the record in the sentence.
    """
    if not is_list(value):
        raise UserError(f"{place} {no_list(field, value, 'texts')}")
    for element in value:
        if not isinstance(element, str):
            raise UserError(f"{place} {no_text(field, element)}.")
    return list(value)


def is_list(value: Any) -> bool:
    """Say whether a value is a list, which a text is not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def number_of(value: Any) -> float | None:
    """Return a number, also one that a text writes in digits, as csv does; None for all else."""
    written = isinstance(value, str) and _NUMBER.fullmatch(value)
    if not written and (isinstance(value, bool) or not isinstance(value, Real)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None


def no_text(field: str, value: Any) -> str:
    """Say that a field holds no text but something else, and what would do."""
    if value is None:
        return f"has no text in {field!r}; give one"
    if isinstance(value, bool | int | float):
        return (
            f"has no text in {field!r} but {described(value)}; "
            f"write it as a text, {json.dumps(_digits(value))}"
        )
    return f"has no text in {field!r} but {described(value)}; give one text"


def no_list(field: str, value: Any, what: str) -> str:
    """Say that a field holds no list but something else."""
    return f"has no list of {what} in {field!r} but {described(value)}; give one."


def listed(names: Iterable[Any]) -> str:
    """List names that stand in a file, in a line, and not thousands of them."""
    names = list(map(str, names))
    some = [named(name, 40) for name in names[:MOST_NAMES]]
    return ", ".join([*some, *(["…"] if names[MOST_NAMES:] else [])])


def filled(record: Mapping[str, Any]) -> str:
    """List the fields of a record that hold something."""
    return listed(field for field, value in record.items() if value is not None)


def first_line(error: Exception) -> str:
    """What a library's error begins with, in characters that can be seen."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in lines[0])


def described(value: Any) -> str:
    """Say in a few words what a value is: ``the number 5``, ``true``, ``a list``."""
    if isinstance(value, bool):
        return _digits(value)
    if isinstance(value, int | float):
        return f"the number {_digits(value)}"
    if isinstance(value, str):
        return f"the text {shown(value, 40)}"
    names = {type(None): "null", dict: "an object", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")


def _digits(value: bool | int | float) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
