"""Shipped configurations with one thing wrong in each, and what the commands say of them.

``mutants(seed, count)`` gives the same ones for the same seed. ``judge`` takes one as far as a plan
goes: parsed, checked, its module made; no model is loaded and nothing runs. Where this file is run
it prints every sentence: ``python tests/mutation/configurations.py SEED COUNT``.
"""

from __future__ import annotations

import copy
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
FIT = ["quickstart.yaml", "families/e2e/tiny.yaml", "families/glue/tiny.yaml"]
COMPARE = ["tiny_droplora_rate.yaml", "tiny_prunedlora_interval.yaml", "tiny_loradrop_sample.yaml"]
FINE, SENTENCE, TRACEBACK, HANG = "fine", "sentence", "traceback", "hang"

VALUES: list[Any] = [
    None, True, -1, 0, 3, 10**30, 1.5, -0.1, 1e400, float("nan"), -float("inf"), "", " ", "x",
    "2020-01-01", "12:30:45", "1e-3", "null", "[1, 2", "{a: 1}", "a: b: c", "../nowhere.yaml", "/",
    "x" * 5000, "ü\u2028", "a\nb", [], [1, 2], [None], ["x"], [[1], {"a": 2}], {}, {"a": 1},
    {"class_path": None}, {"class_path": "LoRA"}, {"class_path": "no.such.Class"},
    {"class_path": "os.system", "init_args": {"command": "true"}}, "os.system", "subprocess.Popen",
    {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}, "torch.nn.Linear",
    "torch.hub.load", {"class_path": "torch.nn.Linear", "init_args": 5}, {"init_args": [1]},
    {"class_path": "AdamW", "init_args": {"lr": [1]}}, ["AdamW", "SGD"], {1: 2}, {None: 3},
]  # fmt: skip
KEYS = ["r", "lr", "x", "", "a.b", ".", "init_args", "class_path", "model", "trainer.max_steps"]


class Mutant(NamedTuple):
    """One wrong configuration.

    Attributes:
        name: What was done to which file.
        command: ``fit`` or ``compare``.
        file: Name of the configuration's file.
        content: What the file holds.
    """

    name: str
    command: str
    file: str
    content: bytes


class Verdict(NamedTuple):
    """What a command said.

    Attributes:
        kind: Fine, sentence, traceback or hang.
        text: The sentence, or the traceback.
        seconds: That it took.
    """

    kind: str
    text: str
    seconds: float


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """Wrong configurations, the same for the same seed.

    Args:
        seed: Of the choices.
        count: How many.
    """
    sources = [("fit", name, _read(f"configs/{name}")) for name in FIT]
    sources += [("compare", name, _small(_read(f"configs/compare/{name}"))) for name in COMPARE]
    choices = random.Random(seed)
    for number in range(count):
        command, source, tree = sources[number % len(sources)]
        of_text = choices.random() < 0.25
        kind, content = (_spoil_text if of_text else _spoil_tree)(choices, copy.deepcopy(tree))
        name = f"{seed}.{number} {source}: {kind}"
        yield Mutant(name, command, f"mutant{number}.yaml", content)


def judge(mutant: Mutant, folder: Path, resolver: Any, limit: int = 60) -> Verdict:
    """Take a mutant as far as a plan goes.

    Args:
        mutant: The configuration.
        folder: Where its file is written.
        resolver: A ``Resolver``, whose parser is made once for all.
        limit: Seconds after which it counts as a hang.
    """
    from lightning_peft.errors import UserError

    path = folder / mutant.file
    path.write_bytes(mutant.content)
    began = time.perf_counter()
    kind, text = FINE, ""
    try:
        with _at_most(limit):
            _plan(mutant.command, path, resolver)
    except UserError as error:
        kind, text = SENTENCE, str(error)
    except _Hang:
        kind = HANG
    except (Exception, SystemExit):
        kind, text = TRACEBACK, traceback.format_exc()
    return Verdict(kind, text, time.perf_counter() - began)


def says_where(mutant: Mutant, sentence: str) -> bool:
    """Whether a sentence names the file, or a key: one of the file, of a path of keys, of fit."""
    known = ["model", "data", "trainer", "importance", "checkpoint", "record", "runs", "folder"]
    known += re.findall(r"[\w.]+(?=:)", mutant.content.decode("utf-8", "ignore"))
    keys = {part for key in known for part in (key, key.split(".")[-1]) if len(part) > 1}
    words = {part for word in re.findall(r"[\w.]+", sentence) for part in (word, *word.split("."))}
    return mutant.file in sentence or not keys.isdisjoint(words)


def _plan(command: str, path: Path, resolver: Any) -> None:
    from lightning_peft.commands.compare import read_comparison
    from lightning_peft.comparison.plan import make_plan

    if command == "fit":
        resolver.module(resolver.tree(["--config", str(path)]))
        return
    comparison, folder, extra, _ = read_comparison(["--config", str(path)])
    make_plan(comparison, folder, extra, resolver)


class _Hang(BaseException):
    pass


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def _small(tree: dict[str, Any]) -> dict[str, Any]:
    """A comparison of two runs, whose files are found from everywhere, and whose rank is given."""
    compare = ROOT / "configs" / "compare"
    tree["base"] = [str((compare / name).resolve()) for name in tree["base"]]
    tree["runs"] = dict(list(tree["runs"].items())[:2])
    tree["grid"] = {
        name: {key: values[:1] for key, values in points.items()}
        for name, points in tree.get("grid", {}).items()
        if name in tree["runs"]
    }
    for key in ("match", "baseline", "baselines"):
        tree.pop(key, None)
    return tree


# What is done to the values.


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree: what holds it, and its key or number there."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _places(node[key])


def _spoil_tree(choices: random.Random, tree: Any) -> tuple[str, bytes]:
    holder, key = choices.choice(list(_places(tree)))
    changes: list[Callable[..., str]] = [_set, _set, _set, _delete, _rename, _wrap, _add, _swap]
    kind = choices.choice(changes)(choices, tree, holder, key)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return kind, text.encode()


def _set(choices: random.Random, tree: Any, holder: Any, key: Any) -> str:
    value = choices.choice(VALUES)
    holder[key] = copy.deepcopy(value)
    return f"{key} = {str(value)[:60]!r}"


def _delete(choices: random.Random, tree: Any, holder: Any, key: Any) -> str:
    del holder[key]
    return f"without {key}"


def _rename(choices: random.Random, tree: Any, holder: Any, key: Any) -> str:
    new = choices.choice([*KEYS, f"{key}s", str(key)[:-1], str(key).upper()])
    if isinstance(holder, dict):
        holder[new] = holder.pop(key)
    return f"{key} is called {new!r}"


def _wrap(choices: random.Random, tree: Any, holder: Any, key: Any) -> str:
    holder[key] = choices.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
    return f"{key} wrapped"


def _add(choices: random.Random, tree: Any, holder: Any, key: Any) -> str:
    new = choices.choice(KEYS)
    if isinstance(holder, dict):
        holder[new] = copy.deepcopy(choices.choice(VALUES))
    return f"{new!r} beside {key}"


def _swap(choices: random.Random, tree: Any, holder: Any, key: Any) -> str:
    other, place = choices.choice(list(_places(tree)))
    holder[key] = copy.deepcopy(other[place])
    return f"{key} as {place}"


# What is done to the text.


def _spoil_text(choices: random.Random, tree: Any) -> tuple[str, bytes]:
    lines = yaml.safe_dump(tree, sort_keys=False).splitlines()
    at = choices.randrange(len(lines))
    kinds: dict[str, Callable[[], list[str]]] = {
        "line twice": lambda: [*lines[:at], lines[at], *lines[at:]],
        "line again at the end": lambda: [*lines, lines[at].strip()],
        "no line": lambda: [*lines[:at], *lines[at + 1 :]],
        "line further in": lambda: [*lines[:at], f"   {lines[at]}", *lines[at + 1 :]],
        "tab": lambda: [*lines[:at], f"\t{lines[at]}", *lines[at + 1 :]],
        "cut": lambda: lines[:at],
        "bracket": lambda: [*lines[:at], f"{lines[at]} {{[", *lines[at + 1 :]],
        "alias": lambda: [*lines[:at], f"{lines[at]} *nothing", *lines[at + 1 :]],
        "bomb": lambda: [*lines, "a: &a [x, x, x, x, x, x, x, x]", *_bomb(9)],
        "deep": lambda: [*lines, "model.peft_path: " + "[" * 300 + "]" * 300],
        "tag": lambda: [*lines, "folder: !!python/object/apply:os.system ['true']"],
    }
    kind = choices.choice([*kinds, "utf-16", "byte"])
    content = "\n".join(kinds[kind]() if kind in kinds else lines).encode()
    if kind == "utf-16":
        content = content.decode().encode("utf-16")
    if kind == "byte":
        place = choices.randrange(len(content))
        content = content[:place] + b"\xff\x00" + content[place:]
    return f"{kind}, line {at + 1}", content


def _bomb(levels: int) -> list[str]:
    names = "abcdefghijklmnop"[: levels + 1]
    pairs = zip(names, names[1:], strict=False)
    return [f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]" for old, new in pairs]


def main(seed: int, count: int) -> None:
    """Print what the commands say, tracebacks last."""
    from lightning_peft.settings.resolve import Resolver

    sys.argv = ["lightning-peft"]
    resolver, found = Resolver(), []
    with tempfile.TemporaryDirectory() as folder:
        for mutant in mutants(seed, count):
            verdict = judge(mutant, Path(folder), resolver)
            found.append((mutant, verdict))
            if verdict.kind == SENTENCE:
                where = "" if says_where(mutant, verdict.text) else "NOWHERE "
                text = verdict.text.replace(folder, "")
                print(f"{verdict.seconds:.1f} {where}{mutant.name}\n      {text[:300]}", flush=True)
    for mutant, verdict in found:
        if verdict.kind in (TRACEBACK, HANG):
            print(f"{verdict.kind.upper()} {mutant.name}\n{verdict.text}")
    kinds = [verdict.kind for _, verdict in found]
    said = [(m, v.text) for m, v in found if v.kind == SENTENCE]
    nowhere = sum(not says_where(*pair) for pair in said)
    print({kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}, f"nowhere: {nowhere}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
