"""Files of data, damaged on purpose, and what the data modules say of them.

    PYTHONPATH=$PWD HF_HUB_OFFLINE=1 python tests/mutation/data_files.py 0 400     # seed and count

A mutant is a small file of one task, real records where ``../shared/data`` lies and else a few of
ours, changed in its bytes or in its values, the same ones for a seed. :func:`judge` sets the task's
data module up with it, up to the token ids. "fine" means that these are the ids of what the file
says, by a reading of its own; otherwise there is the sentence, or the traceback.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import logging
import math
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from data_tasks import REAL, TASKS, Task
from transformers import AutoTokenizer

from lightning_peft.assets import TINY_LLAMA
from lightning_peft.errors import UserError

Record = dict[str, Any]
SLOW = 5.0  # seconds
DEEP: Any = 0
for _ in range(400):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, 5, -1, 0, 1.5, 1e308, 10**40, math.nan, math.inf, True, False, "", " ", "5", "00501",
    "1.50", "true", "None", "NA", "nan", "2020-01-01", "2020-01-01T00:00:00Z", "é\u2028\u0085x",
    "\U0001f600", "\ud800", "a\0b", "a\r\nb", "{instruction}", "```", "#### 3", "\\boxed{",
    "x" * 9000,
    [], {}, [None], ["a"], ["a", 5], [["a"]], {"a": None}, {"role": "user", "content": "a"},
    [{"role": "user", "content": "a"}], [{"text": 5}], DEEP,
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged file of a task: what was done, and its content."""

    what: str
    task: str
    content: bytes


# Files --------------------------------------------------------------------------------------------


def written(kind: str, records: list[Record]) -> bytes:
    """Write records in a form."""
    out = io.StringIO(newline="")
    if kind == "jsonl":
        return "".join(f"{json.dumps(r)}\n" for r in records).encode()
    if kind == "json":
        return json.dumps(records, indent=1).encode()
    if kind == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), buffer)
        return buffer.getvalue()
    fields = list(dict.fromkeys(field for r in records for field in r))
    if kind == "tsv":
        rows = [fields, *([str(r.get(f, "")) for f in fields] for r in records)]
        return "".join("\t".join(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    writer = csv.DictWriter(out, fields)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode("utf-8", "surrogatepass")


def by_hand(kind: str, content: bytes) -> list[Record]:
    """Read a file without the package, an empty cell as nothing."""
    if kind == "parquet":
        return pq.read_table(io.BytesIO(content)).to_pylist()  # type: ignore[no-any-return]
    text = content.decode("utf-8-sig")
    if kind == "csv":
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        named = (zip(header, row, strict=True) for row in rows if row)
        return [{name: cell or None for name, cell in row} for row in named]
    if kind == "tsv":
        header, *rows = (line.rstrip("\r").split("\t") for line in text.split("\n") if line)
        return [dict(zip(header, row, strict=True)) for row in rows]
    if text.lstrip().startswith("["):
        return json.loads(text)  # type: ignore[no-any-return]
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError:
        return [json.loads(text)]


@cache
def good(name: str) -> list[Record]:
    """The first records of a task's real file, or ours."""
    task = TASKS[name]
    path = REAL / task.real
    if not task.real or not path.is_file():
        return list(task.ours)
    return by_hand(path.suffix[1:], path.read_bytes())[task.first : task.first + 3]


# Mutants ------------------------------------------------------------------------------------------


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """Damaged files, the same ones for a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        name = rng.choice(sorted(TASKS))
        kind, records, said = TASKS[name].kind, copy.deepcopy(good(name)), []
        if rng.random() < 0.6:
            said = [_change_values(rng, records) for _ in range(rng.choice((1, 1, 2)))]
        try:
            content = written(kind, records)
        except (ValueError, pa.ArrowException, TypeError):  # what a form cannot hold
            content = written(kind, good(name))
        while not said or rng.random() < 0.2:
            change = rng.choice(BYTES)
            content = change(rng, content)
            said.append(change.__name__.strip("_"))
        yield Mutant("; ".join(said), name, content)


def _change_values(rng: random.Random, records: list[Record]) -> str:
    number = rng.randrange(len(records))
    places = list(_places(records[number]))
    holder, key = rng.choice(places or [(records[number], "extra")])
    kind = rng.choice(("set", "set", "set", "set", "drop", "add", "repeat", "empty", "digits"))
    if kind == "drop" and places:
        del holder[key]
    elif kind == "add":
        records[number][rng.choice(("extra", "", "text", "label", "messages"))] = rng.choice(VALUES)
    elif kind == "repeat":
        records.insert(rng.randrange(len(records) + 1), copy.deepcopy(records[number]))
    elif kind == "empty":
        records[number] = {}
    elif kind == "digits":
        holder[key] = str(holder[key] if places else 5)
    else:
        holder[key] = rng.choice(VALUES)
        return f"record {number + 1}, {key}: {str(holder[key])[:40]!r}"
    return f"record {number + 1}, {key}: {kind}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in a record that can be changed, however deep."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut_off(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _cut_out(rng: random.Random, content: bytes) -> bytes:
    begin = rng.randrange(len(content) + 1)
    return content[:begin] + content[begin + rng.choice((1, 3, 50)) :]


def _insert(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    more = (
        b"\0",
        b"\xff",
        b"\n",
        b"\r",
        b'"',
        b",",
        b"{",
        b"[" * 3000,
        b"\\ud800",
        rng.randbytes(9),
    )
    return content[:place] + rng.choice(more) + content[place:]


def _repeat(rng: random.Random, content: bytes) -> bytes:
    begin = rng.randrange(len(content) + 1)
    piece = content[begin : begin + rng.choice((1, 20, 200))]
    return content[:begin] + piece + content[begin:]


def _encode(rng: random.Random, content: bytes) -> bytes:
    text = content.decode("utf-8", "replace")
    encoding = rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"))
    return text.encode(encoding, "replace")


def _compress(rng: random.Random, content: bytes) -> bytes:
    packed = gzip.compress(content, mtime=0)
    return rng.choice((packed, packed[: rng.randrange(len(packed))]))


def _line_ends(rng: random.Random, content: bytes) -> bytes:
    return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"", b"\n \n")))


def _literal(rng: random.Random, content: bytes) -> bytes:
    """JSON's words in place of a text."""
    word = rng.choice((b"NaN", b"-Infinity", b"1e999", b"null", b"9" * 5000, b"01", b"1.", b"tru"))
    found = list(re.finditer(rb'"[^"\n]*"', content))
    if not found:
        return content + word
    place = rng.choice(found)
    return content[: place.start()] + word + content[place.end() :]


BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip, _cut_off, _cut_out, _insert, _repeat, _encode, _compress, _line_ends, _literal,
)  # fmt: skip


# What comes out -----------------------------------------------------------------------------------


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def judge(mutant: Mutant) -> str:
    """Set a data module up with a mutant: "fine", "sentence: …", "wrong: …" or a traceback."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    task = TASKS[mutant.task]
    with tempfile.TemporaryDirectory(prefix="mutant") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        for file, records in task.beside.items():
            _put(folder / file, written(Path(file).suffix[1:], records))
        _put(folder / task.file, mutant.content)
        begun = time.perf_counter()
        try:
            found = task.read(folder, _tokenizer())
        except UserError as error:
            return f"sentence: {error}"
        except Exception:
            return traceback.format_exc()
        if (seconds := time.perf_counter() - begun) > SLOW:
            return f"wrong: it took {seconds:.0f} s"
        return _compared(task, mutant, found)


def _compared(task: Task, mutant: Mutant, found: Any) -> str:
    try:
        wanted = task.wanted(by_hand(task.kind, mutant.content), _tokenizer())
    except Exception as error:
        return f"wrong: read, although {type(error).__name__}: {error}"
    if repr(found) == repr(wanted):
        return "fine"
    pairs = [(a, b) for a, b in zip(found, wanted, strict=False) if repr(a) != repr(b)]
    return f"wrong: {len(found)} of {len(wanted)} records, {str(pairs[:1])[:400]}"


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def names_its_place(said: str) -> bool:
    """Whether a sentence names the file, the record or a key, and stands in one line."""
    text = said.removeprefix("sentence: ")
    place = r"mutant\w+|\bdata\.\w+|[Rr]ecord \d+ of \S|[Qq]uestion \d+ of \S"
    return bool(re.search(place, text)) and text.isprintable() and len(text) < 1500


def main(seed: int, count: int) -> None:
    """Judge mutants, and say what came out."""
    outcomes: Counter[str] = Counter()
    for mutant in mutants(seed, count):
        said = judge(mutant)
        kind = said.split(":")[0] if said.startswith(("sentence", "wrong")) else said
        kind = "traceback" if kind not in ("sentence", "wrong", "fine") else kind
        if kind == "sentence" and not names_its_place(said):
            kind = "sentence without a place"
        outcomes[kind] += 1
        if kind not in ("sentence", "fine"):
            print(f"{mutant.task}: {mutant.what}\n{said}\n")
    print(dict(outcomes))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
