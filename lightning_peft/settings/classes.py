"""Which classes a configuration may name: at each place those that belong there, and no function.

A configuration is data, often somebody else's. jsonargparse makes of it what it says: it calls any
function as an optimizer (``os.system``), any class where a type says nothing (``Popen``), and
takes whatever has the methods of a protocol. So all that a parsed configuration would call is
looked at here, before anything is made, and what is not known to belong is refused:

* where a type asks for a class, that class or one that is derived from it;
* where it asks for a function, one of :data:`FUNCTIONS`, or one's own;
* where no type says what belongs, only classes of one's own.

One's own is what stands in a file below the current folder, libraries that are installed there
apart. Importing a module runs it, which nothing here prevents but for Python's own modules.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import os
import sys
from argparse import Action
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from lightning_peft.errors import UserError
from lightning_peft.settings.arguments import (
    actions_of,
    arguments_of,
    bases_of,
    choose,
    hint_of,
    inner_of,
    parts_of,
    refuse_null,
)
from lightning_peft.settings.names import import_named, runs_when_named

# Where libraries have functions that arguments of Lightning's ask for: hooks of DDP, policies of
# FSDP, ways to prune. No key of this package asks for one.
FUNCTIONS = (
    "torch.distributed.algorithms.",
    "torch.distributed.fsdp.",
    "torch.nn.utils.prune",
    "torch.profiler.",
)
_Values = collections.abc.Mapping[str, Any] | Namespace


def check_classes(parser: ArgumentParser, config: Namespace) -> None:
    """Refuse a configuration that would call what does not belong where it stands.

    Args:
        parser: That has parsed it.
        config: As parsed, nothing made yet.

    Raises:
        UserError: Naming the key, what was given and what would do.
    """
    _check_group(actions_of(parser), config, "", "")


def is_own(thing: Any) -> bool:
    """Whether a class or function stands in a file of the user's own."""
    name = getattr(thing, "__module__", None) or ""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if module is None or name.partition(".")[0] in ("lightning_peft", *sys.stdlib_module_names):
        return False
    if file is None:  # typed in, or given to Python by -c
        return name == "__main__"
    path, here = Path(file).resolve(), Path.cwd().resolve()
    return path.is_relative_to(here) and not {"site-packages", "dist-packages"} & {*path.parts}


def _check_group(actions: dict[str, Action], values: _Values, dest: str, key: str) -> None:
    for name, value in _items(values):
        action = actions.get(f"{dest}{name}")
        if isinstance(value, Namespace) and any(d.startswith(f"{dest}{name}.") for d in actions):
            _check_group(actions, value, f"{dest}{name}.", f"{key}{name}.")
        elif action is None:
            _check(Any, value, f"{key}{name}")
        elif not _is_default(action, value):
            refuse_null(action, value, f"{key}{name}")
            _check(hint_of(action), value, f"{key}{name}")


def _is_default(action: Action, value: Any) -> bool:
    """Whether a value is what a library takes by itself; a function may stand there by name."""
    default = action.default
    if isinstance(default, str) and "." in default and inspect.isroutine(value):
        with contextlib.suppress(Exception):
            return import_named(default) is value
    return value is default


def _items(values: _Values) -> list[tuple[str, Any]]:
    return list((vars(values) if isinstance(values, Namespace) else values).items())


def _check(hint: Any, value: Any, key: str) -> None:
    if isinstance(value, (Namespace, collections.abc.Mapping)):
        if "class_path" in value:
            _check_spec(hint, value, key)
        elif bases_of(hint):  # the class itself, as of a group of settings
            base, skip = bases_of(hint)[0]
            _check_group(arguments_of(base, skip), value, "", f"{key}.")
        else:
            for name, inner in _items(value):
                _check(inner_of(hint), inner, f"{key}.{name}")
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        for inner in value:
            _check(inner_of(hint), inner, key)
    elif isinstance(value, type):
        _check_type(hint, value, key)
    elif callable(value) and not isinstance(value, os.PathLike):  # a file's name can be called
        _check_function(hint, value, key)


def _check_spec(hint: Any, value: Any, key: str) -> None:
    """Check a class that is to be made, and all that it is to be made of."""
    name = str(value["class_path"])
    bases = bases_of(hint)
    if runs_when_named(name):
        raise _refused(name, bases, key)
    try:
        cls = import_named(name)
    except Exception as error:
        raise UserError(f"{key}: {name!r} cannot be imported ({error}).") from error
    if not inspect.isclass(cls):
        raise _refused(name, bases, key, "it is a function, no class")
    fitting = [skip for base, skip in bases if base in inspect.getmro(cls)]
    own = is_own(cls)
    if not fitting and not own:
        raise _refused(name, bases, key)
    known = arguments_of(cls, fitting[0] if fitting else 0)  # type: ignore[arg-type]
    _check_group(known, value.get("init_args") or {}, "", f"{key}.")
    if not own:
        for inner, more in _items(value.get("dict_kwargs") or {}):
            _check(Any, more, f"{key}.dict_kwargs.{inner}")


def _check_type(hint: Any, value: type, key: str) -> None:
    """Check a class that is handed on as it is."""
    asked = [base for part in parts_of(hint) for base in _types_of(part)]
    if not is_own(value) and not any(base in inspect.getmro(value) for base in asked):
        raise _refused(f"{value.__module__}.{value.__qualname__}", [(b, 0) for b in asked], key)


def _types_of(part: Any) -> list[type]:
    if get_origin(part) is type:
        return [base for base in parts_of(get_args(part)[0]) if inspect.isclass(base)]
    return []


def _check_function(hint: Any, value: Any, key: str) -> None:
    """Check what can be called, and is there already: a function, or an object in a module."""
    bases = bases_of(hint)
    if bases and isinstance(value, tuple(base for base, _ in bases)):
        return
    asked = any(_asks_for_function(part) for part in parts_of(hint))
    module = getattr(value, "__module__", None) or ""
    plain = inspect.isroutine(value) and not isinstance(value, functools.partial)
    if asked and plain and (is_own(value) or f"{module}.".startswith(FUNCTIONS)):
        return
    name = f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}".lstrip(".")
    if asked:
        there = ", ".join(place.rstrip(".") for place in FUNCTIONS)
        raise UserError(
            f"{key}: {name!r} may not stand here; functions are taken from your own files, in the "
            f"current folder, and from {there}."
        )
    raise _refused(name, bases, key, "it is a function, no class")


def _asks_for_function(part: Any) -> bool:
    origin = get_origin(part) or part
    return origin is collections.abc.Callable and not bases_of(part)


def _refused(
    name: str, bases: list[tuple[type, int]], key: str, but: str | None = None
) -> UserError:
    also = f" ({but})" if but else ""
    if not bases:
        return UserError(
            f"{key}: {name!r} may not stand here{also}: no type says what belongs here, and only "
            "classes of your own files, in the current folder, may do so unasked."
        )
    kinds = " or ".join(dict.fromkeys(base.__name__ for base, _ in bases))
    there = ", ".join(choose([base for base, _ in bases])) or "none"
    return UserError(f"{key}: {name!r} is no {kinds}{also}; there are {there}.")
