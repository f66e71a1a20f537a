"""PrunedLoRA over a whole life, and LoRA-drop."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import clock, interleave, ratio, row, save
from models import TARGETS, Shape, batch_of, floor, llama, loss_of, ours, train_step
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import LoRADrop, PrunedLoRA

EVENTS, EVERY = 14, 10  # removals of a life, and steps between two


class AuthorsMask(nn.Module):
    """What the published code prunes with: zeros in a mask of full rank, nothing removed."""

    def __init__(self, r: int, left: int) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(r) < left).float())

    def forward(self, z: Tensor) -> Tensor:
        """Mask rank activations, (..., r)."""
        return z * self.mask


@dataclass
class Life:
    """A run from the first rank to the last.

    Attributes:
        step: The model's training step, for what comes after.
        steps: Seconds of each step, what the strategy does in it included.
        before: Seconds of each step's ``before_step``, which removes where that is due.
        ranks: Of each step, after it.
    """

    step: Callable[[], None]
    steps: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


def live(shape: Shape, high: int, low: int) -> Life:
    """Train through all removals, each as many steps after the last."""
    strategy = PrunedLoRA(
        r=high,
        target_r=low,
        start_step=EVERY,
        prune_every=EVERY,
        prune_count=(high - low) // EVENTS,
        target_modules=TARGETS,
    )
    model = llama(shape)
    strategy.attach(model)
    before = strategy.before_step
    found = Life(train_step(model, batch_of(shape), strategy))

    def timed(*arguments: Any) -> None:
        begin = clock()
        before(*arguments)
        found.before.append(clock() - begin)

    strategy.before_step = timed  # type: ignore[method-assign]
    layers = list(adapter_layers(model).values())
    for _ in range((EVENTS + 1) * EVERY):
        begin = clock()
        found.step()
        found.steps.append(clock() - begin)
        found.ranks.append(layers[0].rank)
    strategy.before_step = before  # type: ignore[method-assign]
    assert {layer.rank for layer in layers} == {low}
    return found


def held(step: Callable[[], None]) -> int:
    """Bytes of trained parameters, their gradients and moments, after a step."""
    model, optimizer = step.model, step.optimizer  # type: ignore[attr-defined]
    parameters = [p for p in model.parameters() if p.requires_grad]
    moments = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    return sum(2 * p.nbytes for p in parameters) + sum(v.nbytes for v in moments)


def life(shape: Shape, rounds: int, **folder: Any) -> None:
    """PrunedLoRA from r = 128 to 16 (four times and half the shape's rank): ``pruned.json``."""
    high, low = 4 * shape.r, shape.r // 2
    whole = live(shape, high, low)
    cases = {
        "floor": floor(shape),
        f"LoRA r = {low}": ours(shape, r=low),
        f"LoRA r = {high}": ours(shape, r=high),
        "PrunedLoRA at the end": whole.step,
        "authors' masking at the end": ours(shape, r=high, rank_gate=lambda r: AuthorsMask(r, low)),
    }
    seconds = interleave(cases, rounds, warmup=1)
    end = ratio(seconds, "PrunedLoRA at the end", f"LoRA r = {low}")
    masking = ratio(seconds, "authors' masking at the end", f"LoRA r = {high}")
    kept = ratio(seconds, "authors' masking at the end", f"LoRA r = {low}")
    size = held(whole.step) / held(cases[f"LoRA r = {low}"])
    first = statistics.median(whole.steps[1:EVERY])
    share = sum(whole.before) / sum(whole.steps)
    mean = statistics.mean(whole.steps[1:]) / first
    title = f"{high} to {low} in {EVENTS} removals, one every {EVERY} steps"
    rows = [
        row("PrunedLoRA's step at the end / LoRA's of that rank", end.pop("median"), 1.03, **end),
        row("PrunedLoRA's parameters, gradients, moments / LoRA's of that rank", size, 1.0),
        row(f"PrunedLoRA's removals / time of its life ({title})", share, 0.03),
        row("PrunedLoRA's mean step over that life / its first steps", mean),
        row(
            "authors' masking at the end / LoRA at the first rank", masking.pop("median"), **masking
        ),
        row("authors' masking at the end / LoRA at the last rank", kept.pop("median"), **kept),
    ]
    events = {
        whole.ranks[at - 1]: whole.before[at]
        for at in range(EVERY, len(whole.steps), EVERY)
        if whole.ranks[at] < whole.ranks[at - 1]
    }
    rows += [
        row(f"one removal event at r = {rank}, in the first steps' time", events[rank] / first)
        for rank in (high, sorted(events)[len(events) // 2], min(events))
    ]
    over_life = {"seconds": whole.steps, "before_step": whole.before, "ranks": whole.ranks}
    save("pruned", rows, seconds=seconds, life=over_life, shape=repr(shape), **folder)


def _half(model: Any) -> dict[str, dict[str, Any]]:
    """A layout with half the parameters: of n layers of a kind n/2 - 1 keep theirs."""
    names = list(adapter_layers(model))
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    kept = {n for group in kinds.values() for n in group[: max(len(group) // 2 - 1, 0)]}
    return {n: {"role": "kept" if n in kept else "shared"} for n in names}


def drop(shape: Shape, rounds: int, **folder: Any) -> None:
    """LoRA-drop at half the parameters, and its probe: ``loradrop.json``."""
    model, strategy = llama(shape), LoRADrop(r=shape.r, probe_epochs=1, target_modules=TARGETS)
    strategy.attach(model)
    strategy.apply(model, _half(model))
    dropped = train_step(model, batch_of(shape), strategy)
    cases = {"LoRA": ours(shape), "LoRA-drop": dropped}
    seconds = interleave(cases, rounds, warmup=1)
    probed, probe = llama(shape), LoRADrop(r=shape.r, probe_epochs=1, target_modules=TARGETS)
    probe.attach(probed)
    batches = [batch_of(shape)] * 4
    begin = clock()
    probe.prepare(probed, lambda share: batches, lambda batch: loss_of(probed, batch))
    probing = (clock() - begin) / len(batches) / statistics.median(seconds["LoRA"])
    step = ratio(seconds, "LoRA-drop", "LoRA")
    half = held(dropped) / held(cases["LoRA"])
    rows = [
        row("LoRA-drop's parameters, gradients, moments / LoRA's", half, 0.5),
        row("LoRA-drop's step / LoRA's", step.pop("median"), **step),
        row("probe, in LoRA's steps for each batch of its sample", probing),
    ]
    save("loradrop", rows, seconds=seconds, shape=repr(shape), **folder)
