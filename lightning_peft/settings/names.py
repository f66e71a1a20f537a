"""Names in a configuration: the classes that they mean, and what was meant by a wrong one."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from lightning_peft.errors import UserError


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


def subclasses(base: type) -> dict[str, type]:
    """The classes by short name that may stand for a base class: it too, unless it is abstract."""
    found = {} if inspect.isabstract(base) else {base.__name__: base}
    sub: type
    for sub in base.__subclasses__():
        found.update(subclasses(sub))
    return {name: cls for name, cls in found.items() if not name.startswith("_")}


def shown_names(base: type) -> list[str]:
    """Names to choose from: the project's and the user's, or else the libraries'."""
    found = {name: cls for name, cls in subclasses(base).items() if cls is not base}
    theirs = ("lightning.", "torch.", "transformers.", "accelerate.", "lightning_peft.settings.")
    ours = sorted(name for name, cls in found.items() if not cls.__module__.startswith(theirs))
    return ours or sorted(found)


def find_class(key: str, name: str, base: type) -> Any:
    """The class of a name.

    Args:
        key: Where the name stands.
        name: A short one, or a path for import.
        base: What it has to be a subclass of, for which short names are looked up.

    Raises:
        UserError: If there is none.
    """
    short = name.rpartition(".")[2]
    classes = subclasses(base)
    if "." not in name:
        if name in classes:
            return classes[name]
        hint = hint_at(name, classes, shown=shown_names(base))
        raise UserError(f"{key}: {name!r} is no {base.__name__}; {hint}")
    try:
        return getattr(importlib.import_module(name.rpartition(".")[0]), short)
    except (ImportError, AttributeError, ValueError) as error:
        near = difflib.get_close_matches(short, classes, n=1)
        also = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"{key}: {name!r} cannot be imported ({error}){also}") from error
