"""Files of comparisons, damaged on purpose, and what planning says of them.

    PYTHONPATH=$PWD HF_HUB_OFFLINE=1 python tests/mutation/comparisons.py 0 200     # seed and count

:func:`judge` reads and plans a mutant in this process; nothing trains. "fine" means that the plan
has the runs, seeds and settings that the file says, by a reading of its own; otherwise there is the
sentence, or the traceback.
"""

from __future__ import annotations

import copy
import math
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.commands.compare import read_comparison
from lightning_peft.comparison.plan import make_plan
from lightning_peft.errors import UserError
from lightning_peft.settings.resolve import Resolver

ROOT = Path(__file__).parents[2]
Tree = dict[str, Any]
GOOD: list[Tree] = [
    {
        "base": [str(ROOT / "configs/quickstart.yaml")],
        "folder": "OUT",
        "overrides": {"trainer.max_steps": 30, "data.batch_size": 8},
        "seeds": [0, 1],
        "baseline": "lora",
        "rates": {"values": [1e-3, 3e-3], "choose_by": "val_loss", "best": "lowest"},
        "runs": {
            "lora": {"model.adapter": "LoRA", "model.adapter.r": 4},
            "drop": {"model.adapter": "DropLoRA", "model.adapter.r": 4, "model.adapter.p": 0.2},
        },
        "workers": 2,
    },
    {
        "base": [str(ROOT / "configs/quickstart.yaml")],
        "folder": "OUT",
        "seeds": [3],
        "score": "test/average",
        "also": ["val_loss"],
        "curve": "train_loss",
        "match": {"parameters": 38912, "rank_of": {"pruned": "model.adapter.target_r"}},
        "grid": {"drop": {"model.adapter.p": [0.1, 0.3]}},
        "runs": {
            "lora": {"model.adapter": "LoRA"},
            "drop": {"model.adapter": "DropLoRA"},
            "pruned": {"model.adapter": "PrunedLoRA", "model.adapter.r": 32},
        },
    },
]
VALUES: tuple[Any, ...] = (
    None, [], {}, "", "x", 0, 1, -1, 2.5, math.nan, math.inf, -math.inf, 10**30, True, "true",
    ["lora"], [None], [[1]], {"lora": 1}, "lora", "test/average", "val_loss", "test/nothing",
    "a/b", "../x", "\0", "\x1b[31m", "x" * 300, [1, 1], [0, 2**32], {"values": [0.1]},
    {"parameters": 0}, {"steps": -5}, {"seconds": math.nan}, "model.adapter.r", "data.seed",
)  # fmt: skip
KEYS = (
    "runs", "folder", "base", "overrides", "grid", "seeds", "baseline", "baselines", "rates",
    "match", "score", "also", "checkpoint", "curve", "workers", "threads", "unknown", "run",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged file: what was done, and its content."""

    what: str
    content: bytes


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """Damaged files, the same ones for a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        tree, said = copy.deepcopy(rng.choice(GOOD)), []
        for _ in range(rng.choice((1, 1, 1, 2))):
            change = rng.choice(CHANGES)
            said.append(f"{change.__name__} {change(rng, tree)}")
        content = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()
        if rng.random() < 0.15:
            content, what = _damaged(rng, content)
            said.append(what)
        yield Mutant("; ".join(said), content)


def _damaged(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    place = rng.randrange(len(content))
    how = rng.choice(("cut", "flip", "tab", "utf-16", "twice", "nul"))
    if how == "flip":
        flipped = bytes([content[place] ^ (1 << rng.randrange(7))])
        return content[:place] + flipped + content[place + 1 :], how
    made = {
        "cut": content[:place],
        "tab": content[:place] + b"\t" + content[place:],
        "utf-16": content.decode().encode("utf-16"),
        "twice": content + b"seeds: [7]\n",
    }
    return made.get(how, content[:place] + b"\0" + content[place:]), how


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _nodes(value, (*path, key))


def _parent(tree: Tree, path: tuple[Any, ...]) -> Any:
    node: Any = tree
    for key in path[:-1]:
        node = node[key]
    return node


def _value(rng: random.Random, tree: Tree) -> str:
    paths = [path for path in _nodes(tree) if path[0] != "base"]
    path, value = rng.choice(paths or [("seeds",)]), rng.choice(VALUES)
    _parent(tree, path)[path[-1]] = value
    return f"{path} = {str(value)[:30]!r}"


def _key(rng: random.Random, tree: Tree) -> str:
    key, value = rng.choice(KEYS), rng.choice(VALUES)
    tree[key] = value
    return f"{key} = {str(value)[:30]!r}"


def _name(rng: random.Random, tree: Tree) -> str:
    """A key that is written otherwise."""
    paths = [path for path in _nodes(tree) if isinstance(path[-1], str)]
    path = rng.choice(paths)
    node, old = _parent(tree, path), path[-1]
    if not isinstance(node, dict):
        return ""
    new = rng.choice((old[:-1], old.upper(), f"{old}.x", f" {old}", old[::-1], "", 3, None, True))
    node[new] = node.pop(old)
    return f"{path} -> {new!r}"


def _drop(rng: random.Random, tree: Tree) -> str:
    path = rng.choice(list(_nodes(tree)))
    del _parent(tree, path)[path[-1]]
    return str(path)


def _names(rng: random.Random, tree: Tree) -> str:
    """Metrics that may or may not be there."""
    name = rng.choice(("test/average", "val_accuracy", "test/avg", "val_los", "lr", "", "rank"))
    key = rng.choice(("score", "curve", "also", "choose_by"))
    if key == "choose_by":
        tree["rates"] = {"values": [1e-3], "choose_by": name}
    else:
        tree[key] = [name] if key == "also" else name
    return f"{key} = {name!r}"


def _budget(rng: random.Random, tree: Tree) -> str:
    match = {
        rng.choice(("parameters", "steps", "seconds", "tolerance", "rank")): rng.choice(
            (0, 1, -1, 38912, 10**12, 0.5, math.nan, math.inf, "model.adapter.nope", None)
        )
    }
    tree["match"] = {"parameters": 38912, **match} if rng.random() < 0.3 else match
    return str(tree["match"])


CHANGES: tuple[Callable[[random.Random, Tree], str], ...] = (
    _value, _value, _value, _key, _key, _name, _name, _drop, _names, _budget,
)  # fmt: skip


# Judging.


def judge(mutant: Mutant, resolver: Resolver) -> str:
    """Plan a mutant: "fine", "sentence: …", or the traceback; "wrong: …" where silence lies."""
    with tempfile.TemporaryDirectory(prefix="mutant") as name:
        path = Path(name) / "comparison.yaml"
        path.write_bytes(mutant.content.replace(b"OUT", f"{name}/out".encode()))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                comparison, folder, extra, _ = read_comparison(["--config", str(path)])
                plan = make_plan(comparison, folder, extra, resolver)
                said = str(plan)
        except UserError as error:
            return f"sentence: {error}"
        except (Exception, SystemExit):
            return traceback.format_exc()
        return _differs(plan, yaml.safe_load(path.read_bytes()), said) or "fine"


def _differs(plan: Any, given: Tree, said: str) -> str:
    """How a plan differs from its file, read here once more."""
    for run in plan.trees:
        begins = [name for name in given["runs"] if run == name or run.startswith(f"{name} ")]
        if not begins:
            return f"wrong: {run} is no run of the file"
        settings = given["runs"][max(begins, key=len)]
        for key, value in settings.items() if isinstance(settings, dict) else ():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found = _found(plan.trees[run], key)
                if found != value and not (key.endswith("r") and plan.parameters):
                    return f"wrong: {run} has {key} = {found}, and not {value}"
    if plan.comparison.seeds != given.get("seeds", [0, 1, 2, 3, 4]):
        return "wrong: other seeds"
    if plan.score not in said or not plan.comparison.curve:
        return "wrong: what is judged is not said"
    match = given.get("match") or {}
    budget, tolerance = match.get("parameters"), match.get("tolerance", 0.05)
    for run, count in plan.parameters.items():
        if abs(count - budget) > tolerance * budget:
            return f"wrong: {run} has {count}, outside the budget"
    return ""


def _found(tree: Any, key: str) -> Any:
    for part in key.split("."):
        inner = tree.get("init_args") if isinstance(tree, dict) and "class_path" in tree else tree
        tree = (inner or {}).get(part)
    return tree


def names_its_place(said: str) -> bool:
    """Whether a sentence names the file or a key, and stands in one line."""
    text = said.removeprefix("sentence: ")
    keys = "|".join((*KEYS, "choose_by", "data", "model", "trainer", "config"))
    return bool(re.search(rf"comparison\.yaml|\b({keys})\b", text)) and text.isprintable()


def main(seed: int, count: int) -> None:
    """Judge mutants, and say what came out."""
    sys.argv = ["lightning-peft"]
    resolver, outcomes = Resolver(), Counter[str]()
    for mutant in mutants(seed, count):
        said = judge(mutant, resolver)
        kind = said.split(":")[0] if said.startswith(("sentence", "wrong")) else said
        kind = "traceback" if kind not in ("sentence", "wrong", "fine") else kind
        if kind == "sentence" and not names_its_place(said):
            kind = "sentence without a place"
        outcomes[kind] += 1
        if kind not in ("sentence", "fine"):
            print(f"{mutant.what}\n{said}\n", flush=True)
    print(dict(outcomes))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
