"""Names in a configuration: the classes that they mean, and what was meant by a wrong one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
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
    return f"there are {', '.join((shown or names)[:30]) or 'none'}."


def subclasses(base: type) -> dict[str, type]:
    """The classes by short name that may stand for a base class: it too, unless it is abstract."""
    found = {} if inspect.isabstract(base) else {base.__name__: base}
    sub: type
    for sub in base.__subclasses__():
        # Of two that share a name the one that was defined first: torch's SGD, not a package's.
        found = {**subclasses(sub), **found}
    return {name: cls for name, cls in found.items() if not name.startswith("_")}


def shown_names(base: type) -> list[str]:
    """Names to choose from: the project's and the user's, or else the libraries'."""
    found = {name: cls for name, cls in subclasses(base).items() if cls is not base}
    ours = sorted(name for name, cls in found.items() if not _is_installed(cls))
    return ours if len(ours) > 2 else sorted(found)


def _is_installed(cls: type) -> bool:
    """Whether a class is of a library, or of no use in a configuration."""
    if cls.__module__.startswith("lightning_peft."):
        return cls.__module__.startswith("lightning_peft.settings.")
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def find_class(key: str, name: str, base: type, *others: type) -> Any:
    """The class of a name.

    Args:
        key: Where the name stands.
        name: A short one, or a path for import.
        base: What it has to be a subclass of, for which short names are looked up.
        others: Further such classes, one of which would do as well.

    Raises:
        UserError: If there is none.
    """
    short = name.rpartition(".")[2]
    bases = (base, *others)
    classes = {n: cls for one in bases for n, cls in subclasses(one).items()}
    shown = sorted({n for one in bases for n in shown_names(one)})
    kind = " or ".join(dict.fromkeys(one.__name__ for one in bases))
    if "." not in name:
        if name in classes:
            return classes[name]
        raise UserError(f"{key}: {name!r} is no {kind}; {hint_at(name, classes, shown=shown)}")
    if runs_when_named(name):
        raise UserError(f"{key}: {name!r} is no {kind}; there are {', '.join(shown[:30])}.")
    try:
        return import_named(name)
    except Exception as error:  # a module may raise anything while it is imported
        near = difflib.get_close_matches(short, classes, n=1)
        also = f"; did you mean {near[0]}?" if near else "."
        plain = isinstance(error, (ImportError, AttributeError, ValueError))
        reason = str(error) if plain else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())[:200]
        raise UserError(f"{key}: {name!r} cannot be imported ({reason}){also}") from error


def runs_when_named(name: str) -> bool:
    """Whether a dotted name is of a module that is better not even imported.

    No class of Python's own library stands in a configuration, some of its modules do something
    when they are imported, and a ``__main__`` runs its program.
    """
    first, *others = name.split(".")
    return first in sys.stdlib_module_names or "__main__" in others


def import_named(name: str) -> Any:
    """What a dotted name means: of a module, or of a class in a module.

    Raises:
        ImportError: Or whatever else the module raises.
        AttributeError: If the module has no such name.
    """
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last)
    except ModuleNotFoundError:
        outer, _, cls = module.rpartition(".")
        if not outer or outer not in sys.modules:
            raise
        return getattr(getattr(sys.modules[outer], cls), last)
