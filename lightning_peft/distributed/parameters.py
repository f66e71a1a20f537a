"""Parameters, gradients and moments in full, under any engine.

Every function that returns something full is a collective: all processes call it, in the same
order. Which engine keeps a parameter is seen from the parameter (:func:`keeper_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.distributed.fsdp import Fsdp
from lightning_peft.distributed.keeper import Keeper
from lightning_peft.distributed.processes import is_distributed
from lightning_peft.distributed.whole import Whole
from lightning_peft.distributed.zero import Zero3, Zero12

Change = Callable[[Tensor], Tensor]

KEEPERS: tuple[type[Keeper], ...] = (Fsdp, Zero3, Zero12, Whole)
"""How engines keep parameters; the last one is for all that none of the others keeps."""


def keeper_of(p: nn.Parameter) -> Keeper:
    """What answers for a parameter, by the engine that keeps it."""
    return next(keeper(p) for keeper in KEEPERS if keeper.keeps(p))


def resizable(p: nn.Parameter) -> bool:
    """Whether a parameter may change its size: only where no engine has buckets of it."""
    return not is_distributed() and keeper_of(p).plain


def is_cut(p: nn.Parameter) -> bool:
    """Whether this process holds a piece of a parameter only."""
    return keeper_of(p).is_cut


def shape(p: nn.Parameter) -> torch.Size:
    """A parameter's shape, also where this process holds a piece of it."""
    return keeper_of(p).shape()


@torch.no_grad()
def value(p: nn.Parameter) -> Tensor:
    """A parameter's full value, detached."""
    return keeper_of(p).value()


@torch.no_grad()
def write(p: nn.Parameter, full: Tensor) -> None:
    """Set a parameter, the engine's own copies of it included."""
    keeper_of(p).write(full)


@torch.no_grad()
def gradient(p: nn.Parameter) -> Tensor | None:
    """A parameter's full gradient, averaged over processes; None where none came.

    To be called after the backward pass of a whole accumulation window.
    """
    return keeper_of(p).gradient()


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of the full gradient of all these parameters, a scalar."""
    grads = [gradient(p) for p in parameters if p.requires_grad]
    return nn.utils.get_total_norm([grad for grad in grads if grad is not None])


@torch.no_grad()
def moments(p: nn.Parameter, optimizer: Any) -> dict[str, Tensor]:
    """What the optimizer remembers of each value of a parameter, in full, by key.

    Nothing of one that does not train.

    Raises:
        UserError: If it packs values together (8-bit, factored), so that none can be taken out.
    """
    return keeper_of(p).moments(optimizer) if p.requires_grad else {}


def refuse_packed(parameters: Iterable[nn.Parameter], optimizer: Any) -> None:
    """Refuse an optimizer whose state could not follow if components left or came.

    No collective. Under ZeRO state is flat, and looked at when ranks change.

    Args:
        parameters: Those whose state counts.
        optimizer: After its first step, before which it has no state.

    Raises:
        UserError: If it packs values together (8-bit, factored).
    """
    for p in parameters:
        if p.requires_grad:
            keeper_of(p).moment_keys(optimizer)


@torch.no_grad()
def write_moment(p: nn.Parameter, optimizer: Any, key: str, full: Tensor) -> None:
    """Set what the optimizer remembers of a parameter under one key, in full."""
    keeper_of(p).write_moment(optimizer, key, full)


@torch.no_grad()
def rewrite(p: nn.Parameter, change: Change, optimizer: Any = None) -> None:
    """Change a parameter, its gradient and its moments alike, each in full, sizes unchanged.

    Args:
        p: The parameter.
        change: From a full tensor to one of the same shape.
        optimizer: Whose moments follow; without it they stay as they are.
    """
    keeper = keeper_of(p)
    keeper.write(change(keeper.value()))
    grad = keeper.gradient()
    if grad is not None:
        keeper.write_gradient(change(grad))
    for key, moment in moments(p, optimizer).items() if optimizer is not None else ():
        keeper.write_moment(optimizer, key, change(moment))


@contextmanager
def gathered(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have some parameters whole on all processes while the block runs, for reading.

    Args:
        model: The model, whose root holds them under FSDP2.
        parameters: The parameters; no value may be changed.
    """
    kept: dict[type[Keeper], list[nn.Parameter]] = {}
    for p in parameters:
        kept.setdefault(type(keeper_of(p)), []).append(p)
    with ExitStack() as stack:
        for keeper, own in kept.items():
            stack.enter_context(keeper.gathered(model, own))
        yield
