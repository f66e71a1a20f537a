"""The strategies without a target beside PEFT's, where it has them; and the optimizer's step."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import interleave, overhead_ratio, ratio, row, save
from models import TARGETS, Shape, batch_of, floor, llama, ours, peft, train_step
from parts import optimizer_step
from steps import above_floor, memory_rows, peaks
from torch import Tensor

LATER = 10**6  # steps: what is due then never comes here


class _PeftAdaLora:
    """What PEFT has a loop do for AdaLoRA, in a strategy's methods."""

    def make_optimizer(self, model: Any, default: Any) -> Any:
        return default([p for p in model.parameters() if p.requires_grad])

    def penalty(self, model: Any) -> float:
        return 0.0  # PEFT adds its own to the loss

    def before_step(self, model: Any, optimizer: Any, step: int) -> None:
        pass

    def after_step(self, model: Any, optimizer: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)


def _own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).loss


def peft_adalora(shape: Shape) -> Callable[[], None]:
    """A step of PEFT's AdaLoRA, its penalty and its sensitivities included."""
    import peft as library

    config = library.AdaLoraConfig(
        init_r=shape.r, target_r=shape.r // 2, total_step=LATER, target_modules=TARGETS
    )
    model = library.get_peft_model(llama(shape), config)
    return train_step(model, batch_of(shape), _PeftAdaLora(), loss=_own_loss)


def galore_torch(shape: Shape) -> Callable[[], None]:
    """A step of the authors' GaLore on the same weights."""
    from galore_torch import GaLoreAdamW

    model = llama(shape).requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS)):
            module.requires_grad_(True)
    group = {"rank": shape.r, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}

    def optimizer(parameters: Any) -> Any:
        return GaLoreAdamW([{"params": list(parameters), **group}], no_deprecation_warning=True)

    return train_step(model, batch_of(shape), optimizer=optimizer)


def run(shape: Shape, rounds: int, **folder: Any) -> None:
    """Steps between whatever a strategy does at times: ``others.json``."""
    pruned = functools.partial(ours, shape, "PrunedLoRA", target_r=shape.r // 2, start_step=LATER)
    cases = {
        "floor": floor(shape),
        "LoRA": ours(shape),
        "PEFT LoRA": peft(shape),
        "rsLoRA": ours(shape, use_rslora=True),
        "PEFT rsLoRA": peft(shape, use_rslora=True),
        "PiSSA": ours(shape, "PiSSA"),
        "PEFT PiSSA": peft(shape, init_lora_weights="pissa_niter_4"),
        "MiLoRA": ours(shape, "MiLoRA"),
        "AdaLoRA": ours(shape, "AdaLoRA", total_step=LATER, target_r=shape.r // 2),
        "PEFT AdaLoRA": peft_adalora(shape),
        "VeRA, r = 256": ours(shape, "VeRA", r=8 * shape.r),
        "PEFT VeRA, r = 256": peft(shape, "VeraConfig", r=8 * shape.r),
        "GaLore": ours(shape, "GaLore"),
        "galore_torch": galore_torch(shape),
        "TiedLoRA": ours(shape, "TiedLoRA"),
        "SparseAdapter": ours(shape, "SparseAdapter"),
        "DropLoRA sample": ours(shape, "DropLoRA", p=0.5, mask="sample"),
        "DropLoRA learned": ours(shape, "DropLoRA", mask="learned"),
        "DropLoRA token on DoRA": ours(
            shape, "DoRA", rank_gate=functools.partial(_rank_dropout, p=0.5)
        ),
        "PrunedLoRA between removals": pruned(),
        "PrunedLoRA, gradient recovery": pruned(recovery="gradient"),
        "PrunedLoRA, activation recovery": pruned(recovery="activation"),
    }
    seconds = interleave(cases, rounds, warmup=1)
    memory = peaks(cases)
    pairs = [(n, f"PEFT {n}", None) for n in cases if f"PEFT {n}" in cases]
    pairs.append(("GaLore", "galore_torch", None))
    rows = above_floor(seconds, memory)
    rows += [
        row(f"overhead: {name} / {peer}", overhead_ratio(seconds, name, peer, "floor"))
        for name, peer, _ in pairs
    ]
    rows += memory_rows(memory, pairs)
    save("others", rows, seconds=seconds, memory=memory, shape=repr(shape), **folder)


def _rank_dropout(r: int, p: float) -> Any:
    from lightning_peft.strategies.droplora import RankDropout

    return RankDropout(r, p)


def optimizers(shape: Shape, rounds: int, **folder: Any) -> None:
    """AdamW in one kernel, alone and in a step: ``optimizer.json``."""
    fused = functools.partial(torch.optim.AdamW, fused=True)
    rows, raw = [], {}
    for r in (shape.r, 4 * shape.r):
        at = shape.but(r=r)
        cases = {"floor": floor(at), "AdamW": ours(at), "fused": ours(at, optimizer=fused)}
        seconds = interleave(cases, rounds, warmup=1)
        alone = {
            "AdamW": optimizer_step(at, torch.optim.AdamW),
            "foreach": optimizer_step(at, functools.partial(torch.optim.AdamW, foreach=True)),
            "fused": optimizer_step(at, fused),
        }
        stepping = interleave(alone, 5 * rounds, warmup=2)
        plain = statistics.median(stepping["AdamW"]) / statistics.median(seconds["AdamW"])
        rows.append(row(f"AdamW, share of LoRA's step at r = {r}", plain))
        for kind in ("foreach", "fused"):
            got = ratio(stepping, kind, "AdamW")
            rows.append(row(f"{kind} / AdamW at r = {r}", got.pop("median"), **got))
        got = ratio(seconds, "fused", "AdamW")
        title = f"LoRA's step with fused AdamW / with AdamW at r = {r}"
        rows.append(row(title, got.pop("median"), **got))
        raw[f"r = {r}"] = {"steps": seconds, "alone": stepping}
    save("optimizer", rows, seconds=raw, shape=repr(shape), **folder)
