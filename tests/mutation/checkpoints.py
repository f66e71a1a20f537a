"""Checkpoints, damaged on purpose, and what going on from them says.

    PYTHONPATH=$PWD python tests/mutation/checkpoints.py 0 400     # seed and count

A mutant is made of a good checkpoint by a change of its bytes, or by one to three changes of what
it holds; the same ones for a seed. :func:`judge` takes it up as the commands do, and goes on with
it for a step. "fine" means that the tensors loaded are those of the good one, or where the content
was changed, those that the file holds by torch's own reading; otherwise there is the sentence, or
the traceback.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_peft.datamodules import ArithmeticDataModule
from lightning_peft.errors import UserError
from lightning_peft.modules import CausalLMModule
from lightning_peft.runs import AtomicCheckpointIO, check_checkpoint, read_checkpoint
from lightning_peft.strategies import DropLoRA

VALUES: tuple[Any, ...] = (
    None, [], {}, "", "x", 0, -1, 7, 1.5, math.nan, math.inf, True, [1, 2], {"a": 1}, 10**30,
    torch.zeros(3), torch.tensor(math.nan), torch.zeros(2, 2, dtype=torch.int64),
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged checkpoint: what was done, its bytes, and whether its content was rewritten."""

    what: str
    content: bytes
    rewritten: bool


class Bed:
    """A small model with a checkpoint after two steps, in a folder of its own.

    Args:
        base: A folder with a small LLaMA and its tokenizer.
        folder: Where files go.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.path, self.tried = folder / "good.ckpt", folder / "tried.ckpt"
        trainer = self._trainer(max_steps=2)
        trainer.fit(self._module(), self._data())
        trainer.save_checkpoint(self.path)
        self.good = self.path.read_bytes()
        self.tensors = read_checkpoint(self.path)["state_dict"]

    def mutants(self, seed: int, count: int) -> Iterator[Mutant]:
        """Damaged checkpoints, the same for a seed."""
        draw = random.Random(seed)
        for _ in range(count):
            yield self._bytes(draw) if draw.random() < 0.5 else self._content(draw)

    def judge(self, mutant: Mutant) -> str:
        """What going on from a mutant comes to."""
        self.tried.write_bytes(mutant.content)
        try:
            checkpoint = check_checkpoint(read_checkpoint(self.tried), self.tried)
            expected = {**self.tensors}
            if mutant.rewritten:
                expected = {k: v.clone() for k, v in checkpoint["state_dict"].items()}
            return self._go_on(expected)
        except UserError as error:
            return f"sentence: {error}"
        except Exception:
            return f"traceback: {traceback.format_exc()}"

    def _go_on(self, expected: dict[str, Any]) -> str:
        module = self._module()
        trainer = self._trainer(max_steps=3)
        module.on_train_start = lambda: seen.update(  # type: ignore[method-assign]
            {f"model.{k}": v.detach().clone() for k, v in module.model.state_dict().items()}
        )
        seen: dict[str, torch.Tensor] = {}
        trainer.fit(module, self._data(), ckpt_path=self.tried)
        same = all(torch.equal(seen[name], value) for name, value in expected.items())
        return "fine" if same and expected.keys() == self.tensors.keys() else "wrong: other tensors"

    def _trainer(self, max_steps: int) -> Trainer:
        return Trainer(
            accelerator="cpu",
            logger=False,
            max_steps=max_steps,
            limit_val_batches=0,
            default_root_dir=self.folder,
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def _module(self) -> Any:
        torch.manual_seed(0)
        return CausalLMModule(str(self.base), adapter=DropLoRA(r=2, target_modules=["q_proj"]))

    def _data(self) -> Any:
        return ArithmeticDataModule(batch_size=2, train_size=8, val_size=2, test_size=2)

    def _bytes(self, draw: random.Random) -> Mutant:
        content = bytearray(self.good)
        at, size = draw.randrange(len(content)), draw.choice((1, 4, 64, 1024))
        what = draw.choice(("flip", "cut", "zero", "insert", "drop", "copy", "prefix"))
        if what == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif what == "cut":
            del content[at:]
        elif what == "zero":
            content[at : at + size] = bytes(len(content[at : at + size]))
        elif what == "insert":
            content[at:at] = draw.randbytes(size)
        elif what == "drop":
            del content[at : at + size]
        elif what == "copy":
            other = draw.randrange(len(content))
            content[at : at + size] = content[other : other + size]
        else:
            content[:0] = draw.randbytes(size)
        return Mutant(f"{what} at {at}", bytes(content), rewritten=False)

    def _content(self, draw: random.Random) -> Mutant:
        content = copy.deepcopy(torch.load(self.path, weights_only=True))
        done = [_change(content, draw) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        path = self.folder / "changed.ckpt"
        torch.save(content, path)
        return Mutant("; ".join(done), path.read_bytes(), rewritten=True)


def _change(content: Any, draw: random.Random) -> str:
    """Change one entry, at any depth."""
    names: list[str] = []
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return "nothing"
        key = draw.choice(keys)
        names.append(str(key))
        inner = content[key]
        if isinstance(inner, (dict, list)) and inner and draw.random() < 0.8:
            content = inner
            continue
        if isinstance(inner, torch.Tensor) and draw.random() < 0.5:
            content[key] = inner[:1] if inner.ndim else inner + 1
        elif draw.random() < 0.3:
            del content[key]
        else:
            content[key] = draw.choice(VALUES)
        return ".".join(names)


def names_its_place(sentence: str) -> bool:
    """Whether a sentence says which file it is about, or which key."""
    return ".ckpt" in sentence or "model." in sentence or "checkpoint" in sentence


def _main() -> None:
    from lightning_peft.assets import TINY_LLAMA

    seed, count = int(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        bed = Bed(TINY_LLAMA, Path(folder))
        said = [(mutant, bed.judge(mutant)) for mutant in bed.mutants(seed, count)]
    print(Counter(text.split(":")[0] for _, text in said))
    for mutant, text in said:
        if not text.startswith(("fine", "sentence")):
            print(mutant.what, text[-900:], sep="\n", end="\n\n")


if __name__ == "__main__":
    _main()
