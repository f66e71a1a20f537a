"""Does a strategy keep the promises on which checkpoints, merging, export and several devices rest?

:func:`check_strategy` tries a strategy on a small random LLaMA in a plain loop, and raises on the
first promise that it breaks. It takes a second or two, so it can stand in any test::

    def test_my_strategy() -> None:
        check_strategy(MyStrategy(r=4))
"""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapters import (
    adapter_layers,
    adapter_state_dict,
    load_adapter_state,
    load_peft,
    merge,
    save_peft,
    trainable_parameters,
)
from lightning_peft.adapters.peft_format import unreadable
from lightning_peft.errors import UserError
from lightning_peft.strategies import AdapterStrategy

Make = Callable[[], AdapterStrategy]
Batch = dict[str, Tensor]

STEPS = 12
SAVED_AFTER = (2, 7)
LEARNING_RATE = 1e-2
# Relative to the largest logit: what reordered float32 arithmetic may cost, and what is a mistake.
ROUNDING, EXPORT_ROUNDING = 1e-4, 1e-5
VOCABULARY = 61


def check_strategy(strategy: AdapterStrategy | Make, ranks: int = 1) -> None:
    """Try whether a strategy keeps its promises; returns if it does.

    In this order: the attached model equals the base in eval and has a finite loss in training;
    nothing but adapters and ``modules_to_save`` trains; twelve optimizer steps with AdamW have
    finite losses, and each trained parameter has a gradient other than zero within three (twelve
    behind a gate, which may mask it for some); eval is deterministic; what is saved gives the same
    logits when loaded; merged equals unmerged in eval; a run resumed from a checkpoint ends with
    the same bits as one that was never stopped; what is exported gives the same logits in PEFT (if
    installed) and here; activation checkpointing changes no gradient. With more ranks: as many
    processes that average their gradients end with the same parameters, ranks and decisions.

    The run has 12 optimizer steps, so give the strategy a schedule that acts within them. One
    without adapters (full fine-tuning) is spared what makes no sense for it.

    Args:
        strategy: Not yet attached; it is copied and stays as it is. Or what makes one.
        ranks: Processes. Above 1 only their agreement is checked.

    Raises:
        AssertionError: On the first promise that is broken, saying which and where.
        UserError: If the strategy is attached already, or cannot be sent to another process.

    Example::

        class HalfDrop(AdapterStrategy):
            def gate(self, r):
                return nn.Dropout(0.5)

        check_strategy(HalfDrop(r=4))
    """
    make = _maker(strategy)
    if ranks > 1:
        _check_ranks(make, ranks)
        return
    with torch.random.fork_rng():
        _check_start(make)
        trained = _check_training(make)
        saved = trained.save()
        _check_eval(make, trained, saved)
        for after in SAVED_AFTER:
            _check_resume(make, trained, after)
        if any(layer.rank for layer in adapter_layers(trained.model).values()):
            _check_export(make, trained)
        _check_recomputation(make, saved)


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A random LLaMA with two layers and grouped-query attention, the same for one seed.

    Args:
        seed: Of its weights.
        changes: Entries of its configuration.

    Returns:
        The model, in training mode.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).train()


def random_batch(seed: int, rows: int = 4, length: int = 10) -> Batch:
    """Rows of random tokens and random length, padded on the right, padding without labels.

    Args:
        seed: The same batch for the same seed.
        rows: Examples.
        length: Of the longest possible row.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, (rows, length) each.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class _Run:
    """A freshly attached strategy in a plain loop."""

    def __init__(self, make: Make, seed: int = 1, initialize: bool = True) -> None:
        self.strategy = make()
        self.name = type(self.strategy).__name__
        self.model = tiny_llama()
        self.original = list(self.model.parameters())  # kept alive, so that ids stay theirs
        self.optimizer: Optimizer
        self.saved: dict[int, bytes] = {}
        torch.manual_seed(seed)
        self.strategy.attach(self.model, initialize)
        self.model.train()

    def prepare(self) -> None:
        """What a run does before its first step, unless it resumes."""
        self.strategy.prepare(
            self.model,
            lambda ratio: [random_batch(1000 + i) for i in range(2)],
            lambda batch: self.model(**batch).loss,
            _adamw,
        )
        self.model.train()
        self.make_optimizer()

    def make_optimizer(self) -> None:
        self.optimizer = self.strategy.optimizer(list(self.trained().values()), _adamw)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def backward(self, seed: int) -> float:
        loss = self.model(**random_batch(seed)).loss + self.strategy.penalty(self.model)
        loss.backward()
        return loss.item()

    def update(self, step: int) -> None:
        """What follows the backward pass."""
        self.strategy.before_step(self.model, self.optimizer, step)
        self.assert_shapes(f"after before_step at step {step}")
        self.optimizer.step()
        self.strategy.after_step(self.model, self.optimizer, step)
        self.assert_shapes(f"after step {step}")
        self.optimizer.zero_grad()

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.backward(step)
            self.update(step)

    def logits(self) -> Tensor:
        return _logits(self.model)

    def save(self) -> bytes:
        """A checkpoint between two steps."""
        file = io.BytesIO()
        state = {
            "adapter": adapter_state_dict(self.model),
            "strategy": self.strategy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, file)
        return file.getvalue()

    def assert_shapes(self, when: str) -> None:
        """An optimizer with state of another shape fails late, or (fused) is wrong in silence."""
        if not adapter_layers(self.model):
            return
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            where = names.get(id(parameter), "a removed parameter")
            for key, value in {**state, "gradient": parameter.grad}.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    self.broken(
                        f"{when} {key} of {where} has shape {tuple(value.shape)}, the parameter "
                        f"{tuple(parameter.shape)}; keep_components(layer, indices, optimizer) "
                        "shrinks them together."
                    )

    def broken(self, sentence: str) -> NoReturn:
        raise AssertionError(f"{self.name}: {sentence}")


def _adamw(params: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=LEARNING_RATE)


def _maker(strategy: AdapterStrategy | Make) -> Make:
    if not isinstance(strategy, AdapterStrategy):
        return strategy
    if strategy.model is not None:
        raise UserError(
            f"this {type(strategy).__name__} is attached already; give check_strategy a fresh one."
        )
    return lambda: copy.deepcopy(strategy)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Logits in eval at the attended positions, (tokens, vocabulary)."""
    was_training, batch = model.training, random_batch(2000)
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(was_training)
    return logits[batch["attention_mask"].bool()]


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()


def _check_start(make: Make) -> None:
    expected = _logits(tiny_llama())
    run = _Run(make)
    for after in ("attach", "prepare"):
        if after == "prepare":
            run.prepare()
        difference = _distance(run.logits(), expected)
        if not difference <= ROUNDING:
            run.broken(
                f"after {after} the model differs from its base in eval by {difference:.2g} of the "
                "largest logit; initialize must leave each layer equal to its base."
            )
    loss = run.backward(0)
    if not math.isfinite(loss):
        run.broken(f"the first loss in training is {loss}.")


def _base_parameters(run: _Run) -> dict[str, nn.Parameter]:
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


def _check_training(make: Make) -> _Run:
    """Train a run for all steps, watching it."""
    run = _Run(make)
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
        if not torch.equal(parameter, before[name]):
            run.broken(f"training changed the base's {name}.")
    return run


def _assert_touched(run: _Run, untouched: dict[str, nn.Parameter], step: int) -> None:
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


def _assert_optimized(run: _Run, step: int) -> None:
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.trained().items():
        if id(parameter) not in held:
            run.broken(
                f"after step {step} {name} trains, but is none of the optimizer's parameters; "
                "change a parameter in place (keep_components) instead of putting in another."
            )


def _load(saved: bytes, run: _Run) -> dict[str, Any]:
    try:
        return torch.load(io.BytesIO(saved), weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "Unsupported" in line), lines[0])
        raise AssertionError(
            f"{run.name}: state_dict must hold plain values and tensors only, since checkpoints "
            f"are read with weights_only=True: {' '.join(reason.split())[:200]}"
        ) from error


def _restored(make: Make, saved: bytes, seed: int = 3) -> _Run:
    """A fresh run that goes on from a checkpoint, in the order in which the trainer restores."""
    run = _Run(make, seed, initialize=False)
    state = _load(saved, run)
    try:
        run.strategy.restructure(run.model, state["strategy"])
        load_adapter_state(run.model, state["adapter"])
    except ValueError as error:
        raise AssertionError(f"{run.name}: a saved state does not load again: {error}") from error
    run.strategy.load_state_dict(state["strategy"])
    run.make_optimizer()
    run.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return run


def _check_eval(make: Make, trained: _Run, saved: bytes) -> None:
    """Eval is deterministic, what is loaded equals what was saved, and it can be merged."""
    logits = trained.logits()
    if not torch.equal(trained.logits(), logits):
        trained.broken(
            "eval is random, two forward passes of one batch differ; a gate must be a fixed "
            "diagonal unless self.training."
        )
    loaded = _restored(make, saved)
    if not torch.equal(loaded.logits(), logits):
        loaded.broken(
            f"after save and load the logits differ by {_distance(loaded.logits(), logits):.2g} of "
            "the largest; what eval depends on must be a parameter or a buffer."
        )
    counts = [trainable_parameters(run.model, include_saved=True) for run in (trained, loaded)]
    if counts[0] != counts[1]:
        loaded.broken(f"{counts[0]} parameters train, after save and load {counts[1]}.")
    if not adapter_layers(loaded.model):
        return
    difference = _distance(_logits(merge(loaded.model)), logits)
    if not difference <= ROUNDING:
        loaded.broken(
            f"merged and unmerged differ in eval by {difference:.2g} of the largest logit; a gate "
            "must be a fixed diagonal in eval, which folds into B."
        )


def _check_resume(make: Make, finished: _Run, after: int) -> None:
    """Go on in a fresh run from where another was saved, and compare with that other's end."""
    resumed = _restored(make, finished.saved[after])
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


def _check_export(make: Make, trained: _Run) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        save_peft(trained.model, folder)
        for reader, model in _readers(folder):
            difference = _distance(_logits(model), trained.logits())
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


def _check_recomputation(make: Make, saved: bytes) -> None:
    plain, recomputing = _restored(make, saved), _restored(make, saved)
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
        if one.shape != other.shape or (one.numel() and _distance(one, other) > ROUNDING):
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


# Several processes.


def _check_ranks(make: Make, ranks: int) -> None:
    strategy = make()
    name, payload = type(strategy).__name__, _portable(strategy)
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_train_rank, (payload, folder, ranks), nprocs=ranks)
        except torch.multiprocessing.ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            raise AssertionError(f"{name}: {ranks} processes cannot train: {last}") from error
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    for other in results[1:]:
        _compare_ranks(name, results[0], other)


def _portable(strategy: AdapterStrategy) -> bytes:
    """The strategy as bytes that another process can read."""
    name = type(strategy).__name__
    try:
        payload = pickle.dumps(strategy)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"{name} cannot be sent to another process ({error}): give it named functions and "
            "classes of a module, no lambda."
        ) from error
    if b"__main__" in payload:
        raise UserError(
            f"{name} uses a class or function from __main__, which other processes cannot import: "
            "move it into a module of its own, or check it with ranks=1."
        )
    return payload


def _train_rank(rank: int, payload: bytes, folder: str, ranks: int) -> None:
    """One process: the same start on all, its own data and its own random stream afterwards."""
    from torch import distributed

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    run = _Run(lambda: pickle.loads(payload))
    run.prepare()
    torch.manual_seed(10 + rank)
    stopped = None
    for step in range(STEPS):
        run.backward(ranks * step + rank)
        shapes: list[Any] = [None] * ranks
        distributed.all_gather_object(shapes, {n: tuple(p.shape) for n, p in run.trained().items()})
        if any(other != shapes[0] for other in shapes):
            stopped = step
            break
        for parameter in run.trained().values():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            distributed.all_reduce(grad)
            parameter.grad = grad / ranks
        run.update(step)
    result = {
        "stopped": stopped,
        "parameters": {name: p.detach() for name, p in run.trained().items()},
        "ranks": {name: layer.rank for name, layer in adapter_layers(run.model).items()},
        "decisions": run.strategy.decisions,
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _compare_ranks(name: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    advice = "decide by what is equal on all: averaged gradients, parameters, reduced sums."
    for layer, rank in one["ranks"].items():
        if other["ranks"].get(layer) != rank:
            raise AssertionError(
                f"{name}: two processes disagree on the rank of {layer}, {rank} and "
                f"{other['ranks'].get(layer)}; {advice}"
            )
    for parameter, value in one["parameters"].items():
        found = other["parameters"].get(parameter)
        if found is None or not torch.equal(found, value):
            raise AssertionError(
                f"{name}: two processes end with different values of {parameter}; {advice}"
            )
    if one["decisions"] != other["decisions"] or one["stopped"] is not None:
        raise AssertionError(f"{name}: two processes remember different decisions; {advice}")
