"""What a new method touches: its own file, and one line in ``strategies/__init__.py``.

So no method may be known by name anywhere else in the package: neither in code nor in strings that
are more than documentation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_peft
from lightning_peft import strategies
from lightning_peft.strategies import AdapterStrategy

PACKAGE = Path(lightning_peft.__file__).parent
LISTED = "strategies/__init__.py"
METHODS = {
    name: cls
    for name, cls in vars(strategies).items()
    if isinstance(cls, type) and issubclass(cls, AdapterStrategy) and cls is not AdapterStrategy
}
ALLOWED = {
    ("LoRA", "modules/adapted.py"): "the strategy of a module that is given none",
    ("DropLoRA", "cli.py"): "the help of the command line shows how to ask about a method",
}


def own_file(cls: type) -> str:
    return cls.__module__.removeprefix("lightning_peft.").replace(".", "/") + ".py"


def documentation(tree: ast.AST) -> set[int]:
    """Ids of the string constants that stand alone as statements."""
    alone = (n.value for n in ast.walk(tree) if isinstance(n, ast.Expr))
    return {id(value) for value in alone if isinstance(value, ast.Constant)}


def words(tree: ast.AST) -> Iterator[str]:
    """Names that code uses, and the words of its strings."""
    silent = documentation(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rsplit(".", 1)[-1]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # The word LoRA in a sentence is the adapter, not the strategy; alone it is a name.
            sentence = id(node) in silent or " " in node.value.strip()
            found = [] if id(node) in silent else re.findall(r"[\w-]+", node.value)
            yield from (word for word in found if word != "LoRA" or not sentence)


@pytest.fixture(scope="module")
def used() -> set[tuple[str, str]]:
    """Which method is named in which file of the package, but for its own."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        named = METHODS.keys() & set(words(ast.parse(path.read_text())))
        found |= {(n, file) for n in named if file not in (LISTED, own_file(METHODS[n]))}
    return found


def test_every_method_has_a_file_of_its_own() -> None:
    files = {own_file(cls) for cls in METHODS.values()}
    assert len(files) == len(METHODS) >= 12
    assert all((PACKAGE / file).is_file() for file in files)


def test_no_other_file_knows_a_method_by_name(used) -> None:
    assert used - ALLOWED.keys() == set()


def test_what_is_allowed_is_still_true(used) -> None:
    assert ALLOWED.keys() - used == set()


def test_the_methods_name_is_found_wherever_it_could_be_a_dependency() -> None:
    source = '''
"""DoRA in a docstring, and LoRA."""
from lightning_peft.strategies import GaLore
def f(x):
    """VeRA."""
    return isinstance(x, strategies.PiSSA), "MiLoRA", f"{x} is an AdaLoRA", "plain LoRA here"
'''
    found = METHODS.keys() & set(words(ast.parse(source)))
    assert found == {"GaLore", "PiSSA", "MiLoRA", "AdaLoRA"}
    assert METHODS.keys() & set(words(ast.parse('kind == "LoRA"'))) == {"LoRA"}
