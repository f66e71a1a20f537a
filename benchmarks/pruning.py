"""PrunedLoRA over its life, LoRA-drop, and the importance callback."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import clock, interleave, ratio, row, save
from models import Shape, batch_of, floor, llama, loss_of, ours, train_step
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers, keep_components, observe_inputs
from lightning_peft.callbacks.importance import LayerImportance, csv_text, importance_rows
from lightning_peft.reports.records import IMPORTANCE
from lightning_peft.strategies import LoRA, LoRADrop, PrunedLoRA

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


class AuthorsMask(nn.Module):
    """What the published code prunes with: zeros in a mask of full rank, nothing removed."""

    def __init__(self, r: int, left: int) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(r) < left).float())

    def forward(self, z: Tensor) -> Tensor:
        """Mask rank activations, (..., r)."""
        return z * self.mask


def _events(shape: Shape, ranks: list[int], repeat: int) -> dict[int, float]:
    """Seconds of one removal of two components from every matrix, at some ranks."""
    strategy = PrunedLoRA(
        r=ranks[0], target_r=1, prune_every=1, prune_count=2, target_modules=TARGETS
    )
    model = llama(shape)
    strategy.attach(model)
    step = train_step(model, batch_of(shape), LoRA())
    seconds = {}
    for rank in ranks:
        for layer in adapter_layers(model).values():
            keep_components(layer, torch.arange(rank), step.optimizer)  # type: ignore[attr-defined]
        times = []
        for _ in range(repeat):
            loss_of(model, batch_of(shape)).backward()
            begin = clock()
            strategy.before_step(model, step.optimizer, 0)  # type: ignore[attr-defined]
            times.append(clock() - begin)
            step.optimizer.zero_grad()  # type: ignore[attr-defined]
        seconds[rank] = statistics.median(times)
    return seconds


def _held(step: Callable[[], None]) -> int:
    """Bytes of trained parameters, their gradients and moments, after a step."""
    model, optimizer = step.model, step.optimizer  # type: ignore[attr-defined]
    parameters = [p for p in model.parameters() if p.requires_grad]
    moments = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    return sum(2 * p.nbytes for p in parameters) + sum(v.nbytes for v in moments)


def life(shape: Shape, rounds: int, **folder: Any) -> None:
    """PrunedLoRA from r = 128 to 16 (four times and half the shape's rank): ``pruned.json``."""
    high, low = 4 * shape.r, shape.r // 2
    pruned = ours(shape, "PrunedLoRA", r=high, target_r=low, prune_every=1, prune_count=high - low)
    pruned()  # the one removal
    middle = (high + low) // 2
    cases = {
        "floor": floor(shape),
        f"LoRA r = {low}": ours(shape, r=low),
        f"LoRA r = {middle}": ours(shape, r=middle),
        f"LoRA r = {high}": ours(shape, r=high),
        "PrunedLoRA at the end": pruned,
        "authors' masking at the end": ours(shape, r=high, rank_gate=lambda r: AuthorsMask(r, low)),
    }
    seconds = interleave(cases, rounds, warmup=1)
    end = ratio(seconds, "PrunedLoRA at the end", f"LoRA r = {low}")
    masking = ratio(seconds, "authors' masking at the end", f"LoRA r = {high}")
    kept = ratio(seconds, "authors' masking at the end", f"LoRA r = {low}")
    events = _events(shape, [high, middle, low + 2], 3)
    # Cost is close to quadratic between three ranks; the steps' is linear. Each event removes two.
    count = (high - low) // 2
    of_events = count * _simpson([events[r] for r in (high, middle, low + 2)])
    steps = [statistics.median(seconds[f"LoRA r = {r}"]) for r in (high, middle, low)]
    of_steps = 10 * count * _simpson(steps)
    held = _held(pruned) / _held(cases[f"LoRA r = {low}"])
    rows = [
        row("PrunedLoRA's step at the end / LoRA's of that rank", end.pop("median"), 1.03, **end),
        row("PrunedLoRA's parameters, gradients, moments / LoRA's of that rank", held, 1.0),
        row("PrunedLoRA's events / time of its life", of_events / (of_events + of_steps), 0.03),
        row(
            "authors' masking at the end / LoRA at the first rank", masking.pop("median"), **masking
        ),
        row("authors' masking at the end / LoRA at the last rank", kept.pop("median"), **kept),
    ]
    rows += [
        row(f"one removal event at r = {rank}, in steps of that model", at / steps[0])
        for rank, at in events.items()
    ]
    save("pruned", rows, seconds=seconds, events=events, shape=repr(shape), **folder)


def _simpson(values: list[float]) -> float:
    """Mean over an interval from its ends and its middle."""
    return (values[0] + 4 * values[1] + values[2]) / 6


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
    held = _held(dropped) / _held(cases["LoRA"])
    step = ratio(seconds, "LoRA-drop", "LoRA")
    rows = [
        row(
            "LoRA-drop's parameters, gradients, moments / LoRA's",
            held,
            0.5,
        ),
        row("LoRA-drop's step / LoRA's", step.pop("median"), **step),
        row(
            "probe, in LoRA's steps for each batch of its sample",
            probing,
        ),
    ]
    save("loradrop", rows, seconds=seconds, shape=repr(shape), **folder)


def importance(shape: Shape, rounds: int, **folder: Any) -> None:
    """What the callback adds to a step that it watches: ``importance.json``."""
    plain, watched = ours(shape), ours(shape)
    model = watched.model  # type: ignore[attr-defined]
    callback = LayerImportance(1)
    with TemporaryDirectory() as place:
        path = Path(place) / "importance.csv"

        def step() -> None:
            callback._seen = {}
            with observe_inputs(model, callback._add):
                watched()
                lines = csv_text(importance_rows(0, callback._seen), IMPORTANCE)
            with path.open("a") as file:
                file.write(lines)

        seconds = interleave({"LoRA": plain, "watched": step}, rounds, warmup=1)
    every = ratio(seconds, "watched", "LoRA")
    extra, more = every["median"] - 1, {k: every[k] - 1 for k in ("low", "high")}
    naive = _against_naive(model, shape)
    rows = [
        row(
            "importance at every step, share of the step",
            extra,
            0.08,
            **more,
        ),
        row("importance every 50 steps, share of the steps", extra / 50, 0.01),
        row("importance against the naive computation, relative", naive, 1e-5),
    ]
    save("importance", rows, seconds=seconds, shape=repr(shape), **folder)


@torch.no_grad()
def _against_naive(model: Any, shape: Shape) -> float:
    """Largest relative difference from mean ‖ΔW x‖² with a dense ΔW in float64."""
    worst = 0.0

    def compare(name: str, layer: Any, x: Tensor) -> None:
        nonlocal worst
        naive = (x.double() @ layer.delta_weight().double().T).square().sum(-1).mean()
        got = layer.delta_sq_norm(x).float().sum() / len(x)
        worst = max(worst, float((got.double() - naive).abs() / naive))

    with observe_inputs(model, compare):
        loss_of(model, batch_of(shape))
    return worst
