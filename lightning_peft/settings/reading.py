"""The one reader of configurations: files, the files that these name, and values of the words.

YAML lets a key stand twice, and the last one wins in silence. It lets a few lines stand for a
billion values, and nests until the stack is full. What is read here does none of that. jsonargparse
reads through it too: it is the loader of the mode :data:`MODE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from lightning_peft.errors import MissingFile, UserError

MODE = "lightning_peft"
DEEPEST = 40  # levels; configurations that people write have ten
MOST = 100_000  # values, each alias counted as all that it stands for
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Path = tuple[str, ...]


class Unreadable(yaml.YAMLError):
    """A text that is YAML, but not one to be read: why, without the file that it stands in."""


def read_yaml(text: str) -> Any:
    """What a text of YAML holds, as jsonargparse reads it: 1e-3 is a number, a date is a text.

    Args:
        text: The text.

    Raises:
        yaml.YAMLError: If it is no YAML; as :class:`Unreadable`, if it names a key twice, nests too
            deep or holds too much.
    """
    if any(mark in text for mark in "[{&\n") or text.count(": ") > 1:
        refuse_endless(text)
        _refuse_twice(text)
    try:
        return get_loader("yaml")(text)
    except ValueError as error:  # an integer of thousands of digits
        raise Unreadable(" ".join(str(error).split(";")[0].split())) from error


def read_file(path: str | Path, folder: Path, key: str = "--config") -> dict[str, Any]:
    """Read a file of settings.

    Args:
        path: As the user wrote it.
        folder: Where a relative path begins.
        key: What names the file, for errors.

    Raises:
        MissingFile: If there is no such file.
        UserError: If it cannot be read, is no YAML, or holds no keys.
    """
    shown = str(path) if len(str(path)) <= 120 else f"{str(path)[:120]} …"
    text = _text_of(folder / path, f"{key}: ", shown)
    try:
        content = read_yaml(text)
    except Unreadable as error:
        raise UserError(f"{key}: {shown}: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        last = len(text.splitlines())  # what is missing at the end, libyaml finds behind it
        line = f", line {min(mark.line + 1, last)}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        problem = problem or "it cannot be parsed"
        raise UserError(f"{key}: {shown}{line} is not valid YAML: {problem}.") from error
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "nothing but a word"
        kind = kind if text.strip() else "nothing"
        raise UserError(f"{key}: {shown} holds no keys, it is {kind}; settings are key: value.")
    return content


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; False also for what is too long for a path."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def refuse_endless(text: str) -> None:
    """Refuse what nests too deep, or stands for too many values.

    Args:
        text: What may be read as YAML; whatever is none is let through.

    Raises:
        Unreadable: If it is refused.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
            if depth > DEEPEST:
                line = event.start_mark.line + 1  # type: ignore[union-attr]
                raise Unreadable(f"line {line} lies more than {DEEPEST} levels deep")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
    root = yaml.compose(text, Loader=_Loader)
    if isinstance(root, yaml.CollectionNode) and _count(root, {}) > MOST:
        raise Unreadable(f"its anchors (&, *) make it stand for more than {MOST:,} values")


def refuse_endless_words(words: list[str]) -> None:
    """Refuse a word of the command line for the same reasons.

    Raises:
        UserError: Naming the word.
    """
    for word in words:
        if _may_be_endless(word):
            try:
                refuse_endless(word.partition("=")[2] or word)
            except Unreadable as error:
                raise UserError(f"{word[:40]} …: {error}.") from error
            except yaml.YAMLError:
                continue


def _may_be_endless(text: str) -> bool:
    nests = max(text.count("["), text.count("{"), text.count("- ")) > DEEPEST
    return nests or ("&" in text and "*" in text)


def _count(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for; infinitely many if it holds itself."""
    if isinstance(node, yaml.ScalarNode):
        _check_inner(node)
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        known[id(node)] = 1 + sum(_count(child, known) for child in _children(node))
    return known[id(node)]


def _check_inner(node: yaml.ScalarNode) -> None:
    """Check a text in a text: jsonargparse reads it as YAML where its key takes another type."""
    if not _may_be_endless(node.value):
        return
    try:
        refuse_endless(node.value)
    except Unreadable as error:
        raise Unreadable(f"the text in line {node.start_mark.line + 1}: {error}") from error
    except yaml.YAMLError:
        return


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for child in node.value:
        yield from child if isinstance(child, tuple) else (child,)


def _refuse_twice(text: str) -> None:
    """Refuse a key that stands twice, be it once with dots and once in levels."""
    root = yaml.compose(text, Loader=_Loader)
    seen: dict[_Path, int] = {}
    for path, line in _settings(root, ()) if root else ():
        _see(path, line, seen)


def _see(path: _Path, line: int, seen: dict[_Path, int]) -> None:
    if path in seen:
        raise Unreadable(
            f"{'.'.join(path)!r} stands in line {seen[path]} and again in line {line}; each key "
            "once"
        )
    seen[path] = line


def _settings(node: yaml.Node, before: _Path) -> Iterator[tuple[_Path, int]]:
    """Every setting below a node: its key, without what need not be written, and its line."""
    if isinstance(node, yaml.SequenceNode):
        for place, child in enumerate(node.value):
            yield from _settings(child, (*before, f"[{place}]"))
    if not isinstance(node, yaml.MappingNode):
        return
    levels: dict[_Path, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line, name = key.start_mark.line + 1, key.value
        _see((*before, name), line, levels)
        path = (*before, *(part for part in name.split(".") if part != "init_args"))
        if isinstance(value, yaml.MappingNode):
            yield from _settings(value, path)
        else:
            if name in ("init_args", "class_path"):  # the first of which should be a mapping
                path = (*before, name) if name == "init_args" else before
            yield path, line
            yield from _settings(value, path)


def _text_of(place: Path, before: str, shown: str) -> str:
    try:
        exists, whole = place.exists(), place.is_file()
        if not exists:
            raise MissingFile(f"{before}the file {shown} does not exist.")
        if not whole:
            kind = "a folder" if place.is_dir() else "no file"
            raise UserError(f"{before}{shown} is {kind}; give a file of settings.")
        data = place.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{before}{shown} cannot be read ({reason}).") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{before}{shown} is no text, so it is no YAML: line {line} is not in UTF-8."
        ) from error


set_loader(MODE, read_yaml, (yaml.YAMLError,))
