"""What stands around training: start-up, attaching, saving, evaluation and generation."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import clock, interleave, ratio, row, save, spread
from models import TARGETS, Shape, batch_of, llama

from lightning_peft import load_peft, merge, save_peft
from lightning_peft.adapters import adapter_state_dict, load_adapter_state
from lightning_peft.strategies import LoRA


def _processor_seconds(command: list[str]) -> float:
    """Of a process from start to end; the wall's would be the machine's."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_utime + usage.ru_stime


def startup(shape: Shape, rounds: int, **folder: Any) -> None:
    """Help of the command line against the import of Lightning: ``startup.json``."""
    program = [sys.executable, "-m", "lightning_peft"]
    commands = {
        "import lightning.pytorch": [sys.executable, "-c", "import lightning.pytorch"],
        "lightning-peft --help": [*program, "--help"],
        "lightning-peft fit --help": [*program, "fit", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(rounds + 1):
        for name, command in commands.items():
            took = _processor_seconds(command)
            if i:
                seconds[name].append(took)
    rows = []
    for name, most in (("lightning-peft --help", 0.15), ("lightning-peft fit --help", 1.3)):
        got = ratio(seconds, name, "import lightning.pytorch")
        rows.append(row(f"{name} / import lightning.pytorch", got.pop("median"), most, **got))
    save("startup", rows, seconds=seconds, **folder)


def _adapted(shape: Shape) -> Any:
    model = llama(shape)
    LoRA(r=shape.r, target_modules=TARGETS, init_lora_weights=False).attach(model)
    return model


def life(shape: Shape, rounds: int, **folder: Any) -> None:
    """Seconds of attaching, saving, loading, exporting and merging: ``life.json``."""
    took: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        begin = clock()
        result = action()
        took.setdefault(name, []).append(clock() - begin)
        return result

    for _ in range(rounds):
        model, target = llama(shape), llama(shape)
        strategy = LoRA(r=shape.r, target_modules=TARGETS)
        timed("attach", lambda m=model, s=strategy: s.attach(m))
        with TemporaryDirectory() as place:
            path = Path(place)
            timed("save", lambda m=model, p=path: torch.save(adapter_state_dict(m), p / "a.pt"))
            state = timed("load", lambda p=path: torch.load(p / "a.pt"))
            timed("load", lambda m=model, s=state: load_adapter_state(m, s))
            timed("export to PEFT's format", lambda m=model, p=path: save_peft(m, p / "peft"))
            timed("load PEFT's format", lambda m=target, p=path: load_peft(m, p / "peft"))
        timed("merge", lambda m=model: merge(m))
    loads = took["load"]
    took["load"] = [a + b for a, b in zip(loads[::2], loads[1::2], strict=True)]
    rows = []
    for name, values in took.items():
        got = spread(values)
        rows.append(row(f"{name}, seconds", got.pop("median"), **got))
    save("life", rows, shape=repr(shape), **folder)


def inference(shape: Shape, rounds: int, **folder: Any) -> None:
    """Evaluation and greedy generation, merged and beside the base: ``inference.json``."""
    models = {"base": llama(shape), "merged": merge(_adapted(shape)), "unmerged": _adapted(shape)}
    batch, new = batch_of(shape), 4 if shape.tokens < 64 else 24
    prompt = batch["input_ids"][:, : shape.tokens // 4]

    @torch.no_grad()
    def evaluate(model: Any) -> None:
        model(input_ids=batch["input_ids"], use_cache=False)

    @torch.no_grad()
    def generate(model: Any) -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    rows, all_seconds = [], {}
    for what, action in (("evaluation", evaluate), ("generation", generate)):
        cases = {name: lambda m=model, act=action: act(m.eval()) for name, model in models.items()}
        seconds = interleave(cases, rounds, warmup=1)
        all_seconds[what] = seconds
        for name, most in (("merged", 1.03), ("unmerged", None)):
            got = ratio(seconds, name, "base")
            rows.append(row(f"{what}: {name} / base", got.pop("median"), most, **got))
        tokens = shape.batch * (shape.tokens if what == "evaluation" else new)
        per_second = tokens / statistics.median(seconds["unmerged"])
        rows.append(row(f"{what}: tokens a second, unmerged", per_second))
    save("inference", rows, seconds=all_seconds, shape=repr(shape), **folder)
