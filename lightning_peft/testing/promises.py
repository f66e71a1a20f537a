"""The promises that one process can check, each in a plain loop."""

from __future__ import annotations

import importlib.util
import io
import math
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters import (
    adapter_layers,
    load_adapter_state,
    load_peft,
    merge,
    save_peft,
    trainable_parameters,
)
from lightning_peft.adapters.peft_format import without_peft
from lightning_peft.adapters.peft_reading import unreadable
from lightning_peft.testing.loop import (
    EXPORT_ROUNDING,
    ROUNDING,
    SAVED_AFTER,
    STEPS,
    Make,
    Run,
    distance,
    logits_of,
    restore_streams,
)
from lightning_peft.testing.model import tiny_llama


def check_start(make: Make, device: torch.device) -> None:
    """The attached model equals its base in eval and has a finite loss in training."""
    expected = logits_of(tiny_llama().to(device))
    run = Run(make, device=device)
    for after in ("attach", "prepare"):
        if after == "prepare":
            run.prepare()
            if not run.strategy.begins_at_base:
                break
        difference = distance(run.logits(), expected)
        if not difference <= ROUNDING:
            run.broken(
                f"after {after} the model differs from its base in eval by {difference:.2g} of the "
                "largest logit; initialize must leave each layer equal to its base."
            )
    loss = run.backward(0)
    if not math.isfinite(loss):
        run.broken(f"the first loss in training is {loss}.")


def _base_parameters(run: Run) -> dict[str, nn.Parameter]:
    """The base's parameters that nobody asked to train, by full name."""
    patterns = run.strategy.modules_to_save or []
    saved = {
        id(parameter)
        for name, module in run.model.named_modules()
        if any(name == p or name.endswith(f".{p}") for p in patterns)
        for parameter in module.parameters()
    }
    base = {id(p) for layer in adapter_layers(run.model).values() for p in layer.base.parameters()}
    base |= {id(p) for p in run.original}
    return {n: p for n, p in run.model.named_parameters() if id(p) in base - saved}


def check_training(make: Make, device: torch.device) -> Run:
    """Train a run for all steps, watching it."""
    run = Run(make, device=device)
    run.prepare()
    frozen = _base_parameters(run) if adapter_layers(run.model) else {}
    for name, parameter in frozen.items():
        if parameter.requires_grad:
            run.broken(f"the base's {name} trains; only adapters and modules_to_save may.")
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    untouched = run.trained()
    if not untouched:
        run.broken("no parameter trains.")
    torch.manual_seed(2)
    for step in range(STEPS):
        loss = run.backward(step)
        if not math.isfinite(loss):
            run.broken(f"the loss is {loss} at step {step}.")
        untouched = {n: p for n, p in untouched.items() if p.grad is None or not p.grad.any()}
        run.update(step)
        if step in (2, STEPS - 1):
            _assert_touched(run, untouched, step)
        _assert_optimized(run, step)
        if step + 1 in SAVED_AFTER:
            run.saved[step + 1] = run.save()
    for name, parameter in frozen.items():
        if not _is_part(parameter.detach(), before[name]):
            run.broken(f"training changed the base's {name}.")
    return run


def _is_part(part: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is another one, or what is left of it without some of its slices."""
    if part.dim() != whole.dim():
        return False
    shorter = [i for i, n in enumerate(part.shape) if n != whole.shape[i]]
    if len(shorter) != 1:
        return not shorter and torch.equal(part, whole)
    dim = shorter[0]
    slices = iter(whole.movedim(dim, 0))
    return all(any(torch.equal(own, each) for each in slices) for own in part.movedim(dim, 0))


def _assert_touched(run: Run, untouched: dict[str, nn.Parameter], step: int) -> None:
    alive = {id(p) for p in run.model.parameters()}
    # Masks may leave out all components of a small layer: behind a gate it has all steps.
    gated = tuple(
        name for name, layer in adapter_layers(run.model).items() if layer.gate is not None
    )
    for name, parameter in untouched.items():
        waits = step < STEPS - 1 and name.startswith(gated)
        if id(parameter) in alive and parameter.numel() and not waits:
            run.broken(
                f"{name} trains, but had no gradient other than zero in {step + 1} optimizer steps."
            )


def _assert_optimized(run: Run, step: int) -> None:
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.trained().items():
        if id(parameter) not in held:
            run.broken(
                f"after step {step} {name} trains, but is none of the optimizer's parameters; "
                "change a parameter in place (keep_components, add_components) instead of putting "
                "in another."
            )


def _load(saved: bytes, run: Run) -> dict[str, Any]:
    try:
        return torch.load(io.BytesIO(saved), weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "Unsupported" in line), lines[0])
        raise AssertionError(
            f"{run.name}: state_dict must hold plain values and tensors only, since checkpoints "
            f"are read with weights_only=True: {' '.join(reason.split())[:200]}"
        ) from error


def _restored(make: Make, saved: bytes, device: torch.device) -> Run:
    """A fresh run that goes on from a checkpoint, in the order in which the trainer restores."""
    run = Run(make, seed=3, initialize=False, device=device)
    state = _load(saved, run)
    try:
        run.strategy.restructure(run.model, state["strategy"])
        load_adapter_state(run.model, state["adapter"])
    except ValueError as error:
        raise AssertionError(f"{run.name}: a saved state does not load again: {error}") from error
    run.strategy.load_state_dict(state["strategy"])
    run.make_optimizer()
    run.optimizer.load_state_dict(state["optimizer"])
    restore_streams(state["random"])
    return run


def check_eval(make: Make, trained: Run, saved: bytes) -> None:
    """Eval is deterministic, what is loaded equals what was saved, and it can be merged."""
    logits = trained.logits()
    if not torch.equal(trained.logits(), logits):
        trained.broken(
            "eval is random, two forward passes of one batch differ; a gate must be a fixed "
            "diagonal unless self.training."
        )
    loaded = _restored(make, saved, trained.device)
    if not torch.equal(loaded.logits(), logits):
        loaded.broken(
            f"after save and load the logits differ by {distance(loaded.logits(), logits):.2g} of "
            "the largest; what eval depends on must be a parameter or a buffer."
        )
    counts = [trainable_parameters(run.model, include_saved=True) for run in (trained, loaded)]
    if counts[0] != counts[1]:
        loaded.broken(f"{counts[0]} parameters train, after save and load {counts[1]}.")
    if not adapter_layers(loaded.model):
        return
    difference = distance(logits_of(merge(loaded.model)), logits)
    if not difference <= ROUNDING:
        loaded.broken(
            f"merged and unmerged differ in eval by {difference:.2g} of the largest logit; a gate "
            "must be a fixed diagonal in eval, which folds into B."
        )


def check_resume(make: Make, finished: Run, after: int) -> None:
    """Go on in a fresh run from where another was saved, and compare with that other's end."""
    resumed = _restored(make, finished.saved[after], finished.device)
    resumed.train(range(after, STEPS))
    expected = finished.trained()
    for name, parameter in resumed.trained().items():
        if name not in expected or not torch.equal(parameter, expected[name]):
            resumed.broken(
                f"a run saved after {after} steps and resumed ends with another {name}; what steps "
                "or gates remember must be in state_dict or a buffer, and what they draw must come "
                "from torch's global stream."
            )
    if resumed.strategy.decisions != finished.strategy.decisions:
        resumed.broken(f"a run saved after {after} steps and resumed remembers other decisions.")


def check_export(make: Make, trained: Run) -> None:
    """What is exported gives the same logits, where PEFT has the form and a component is alive."""
    layers = adapter_layers(trained.model).values()
    if all(layer.rank == 0 for layer in layers) or without_peft(trained.model) is not None:
        return
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        save_peft(trained.model, folder)
        for reader, model in _readers(folder):
            difference = distance(logits_of(model.to(trained.device)), trained.logits())
            if not difference <= EXPORT_ROUNDING:
                trained.broken(
                    f"the exported adapter, loaded by {reader}, gives logits that differ by "
                    f"{difference:.2g} of the largest."
                )


def _readers(folder: str) -> Iterator[tuple[str, nn.Module]]:
    if unreadable(folder) is None:
        yield "load_peft", load_peft(tiny_llama(), folder)
    if importlib.util.find_spec("peft") is not None:
        from peft import PeftModel

        yield "PEFT", PeftModel.from_pretrained(tiny_llama(), folder)


def check_recomputation(make: Make, saved: bytes, device: torch.device) -> None:
    """Activation checkpointing changes neither gradients nor what the strategy remembers."""
    plain, recomputing = (_restored(make, saved, device) for _ in range(2))
    # transformers 5 renamed it.
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    enable = getattr(recomputing.model, new if hasattr(recomputing.model, new) else old)
    enable({"use_reentrant": False})
    for run in (plain, recomputing):
        torch.manual_seed(4)
        run.backward(STEPS)
    expected = plain.trained()
    for name, parameter in recomputing.trained().items():
        one, other = (
            torch.zeros(1) if p.grad is None else p.grad for p in (parameter, expected[name])
        )
        if one.shape != other.shape or (one.numel() and distance(one, other) > ROUNDING):
            recomputing.broken(
                f"activation checkpointing changes the gradient of {name}; what a gate draws in "
                "forward must come from torch's global stream, which recomputation restores."
            )
    if not _same(recomputing.strategy.state_dict(), plain.strategy.state_dict()):
        recomputing.broken(
            "activation checkpointing changes state_dict; what is recomputed counts once."
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal, tensors to rounding."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=ROUNDING)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
