"""What processes that train together ask of each other: sums, one draw for all, agreement.

On one process each of these is the plain thing and costs nothing. Every function that returns
something reduced is a collective: all processes call it, in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether a process group is up, also one of a single process."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def process_index() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if is_distributed() else 0


def sending_device() -> torch.device:
    """Where tensors must lie to be sent."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def total(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over all processes, in one collective.

    Args:
        tensors: Of any shapes, the same on all processes.

    Returns:
        The sums, each with its tensor's shape, dtype and device.
    """
    if world_size() == 1 or not tensors:
        return list(tensors)
    dtypes = [t.dtype for t in tensors]
    dtype = max(dtypes, key=lambda d: d.itemsize)
    if len({d.is_floating_point for d in dtypes}) > 1:
        dtype = torch.float64  # which holds fractions and counts
    flat = torch.cat([t.detach().reshape(-1).to(sending_device(), dtype) for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return [p.view(t.shape).to(t.device, t.dtype) for p, t in zip(parts, tensors, strict=True)]


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes."""
    return total([tensor])[0] / world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over processes, where no engine is there yet to do it."""
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    for parameter, summed in zip(trained, total(grads), strict=True):
        parameter.grad = summed / world_size()


def from_first(tensor: Tensor) -> Tensor:
    """The first process' tensor, for what is drawn at random and must be one draw."""
    if world_size() == 1:
        return tensor
    sent = tensor.detach().to(sending_device(), copy=True)
    dist.broadcast(sent, 0)
    return sent.to(tensor.device)


def everywhere(value: Any) -> list[Any]:
    """What each process holds, in order; plain values and small tensors."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    sent = torch.tensor(number, device=sending_device())
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    return int(sent)


def leave(seconds: float = 600) -> None:
    """Wait until every process has come here, after the last that they do together.

    A process that ended at once might take away what another is still reading. They meet in the
    group's store, and the first, which may keep it, stays until the others have gone on.

    Args:
        seconds: After which it is taken that another has died.
    """
    if world_size() == 1:
        return
    with suppress(RuntimeError):  # the store has gone, or another process
        store = dist.distributed_c10d._get_default_store()
        for meeting in ("come", "gone"):
            if store.add(f"lightning_peft/{meeting}", 1) == world_size():
                store.set(f"lightning_peft/all {meeting}", "")
            if meeting == "come" or process_index() == 0:
                store.wait([f"lightning_peft/all {meeting}"], timedelta(seconds=seconds))


def shared_out(batches: Iterable[Any]) -> Iterator[Any]:
    """This process' share of batches that all processes iterate over alike.

    Yields:
        Of each group of as many batches as there are processes the one that falls to this process;
        None where the last group has none for it, so that all processes take the same steps.
    """
    count, mine = world_size(), process_index()
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == count:
            yield group[mine]
            group = []
    if group:
        yield group[mine] if mine < len(group) else None


def assert_agreement(step: int, decided: dict[str, Any], what: str) -> None:
    """Raise if processes have decided differently; 16 bytes are compared where they agree.

    Args:
        step: Optimizer step, for the message.
        decided: By layer what was decided, plain values.
        what: What was decided, for the message.

    Raises:
        RuntimeError: On all processes, naming the first process and layer that differ.
    """
    if world_size() == 1:
        return
    text = json.dumps(decided, sort_keys=True)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest], device=sending_device())
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if int(extremes[0]) == -int(extremes[1]):
        return
    found = everywhere(decided)
    for process, other in enumerate(found):
        for layer in sorted({*found[0], *other}):
            one, two = found[0].get(layer), other.get(layer)
            if one != two:
                raise RuntimeError(
                    f"processes disagree on {what} at step {step}: for {layer} process 0 has "
                    f"{one}, process {process} has {two}; decide by what is equal on all "
                    "(lightning_peft.distributed)."
                )
