"""What every keeper is asked, the same on one process and on two; not a test itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.distributed.parameters import keeper_of

Found = dict[str, Any]


def begin() -> None:
    """Have the processes find each other."""
    dist.init_process_group("gloo")


def make_model() -> nn.Sequential:
    """Of odd sizes, which two processes cannot share out evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3, bias=False))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(model: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the rows of this process, or of all where there is but one."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    share = 4 // distributed.world_size()
    first = share * distributed.process_index()
    return model(x[first : first + share]).square().mean()


def ask(model: nn.Module, optimizer: Any, backward: Callable, step: Callable) -> Found:
    """All that strategies and checkpoints ask, around two steps and a change of everything."""
    parameters = distributed.parameters_of(optimizer)
    found: Found = {
        "kept by": {type(keeper_of(p)).__name__ for p in parameters},
        "resizable": {distributed.resizable(p) for p in parameters},
        "is cut": {distributed.is_cut(p) for p in parameters},
        "shapes": [tuple(distributed.shape(p)) for p in parameters],
        "values": [distributed.value(p).clone() for p in parameters],
        "no moments": [distributed.moments(p, optimizer) for p in parameters],
    }
    backward()
    found["gradients"] = [_clone(distributed.gradient(p)) for p in parameters]
    found["norm"] = distributed.gradient_norm(parameters)
    step()
    found["moments"] = [_clones(distributed.moments(p, optimizer)) for p in parameters]
    backward()
    for p in parameters:
        distributed.rewrite(p, lambda t: 2 * t.flip(0), optimizer)
    found["changed"] = [_everything(p, optimizer) for p in parameters]
    step()
    found["stepped"] = [distributed.value(p).clone() for p in parameters]
    with distributed.gathered(model, parameters):
        found["gathered"] = [p.detach().clone() for p in model.parameters()]
    state = distributed.optimizer_state(optimizer)
    found["state"] = {i: _clones(entry) for i, entry in state["state"].items()}
    found["groups"] = [group["params"] for group in state["param_groups"]]
    state["state"] = {i: {k: v + 1 for k, v in e.items()} for i, e in found["state"].items()}
    state["param_groups"][0]["lr"] = 0.5
    distributed.load_optimizer_state(optimizer, state)
    found["loaded"] = distributed.optimizer_state(optimizer)["state"]
    found["lr"] = optimizer.param_groups[0]["lr"]
    distributed.write(parameters[0], torch.ones(5, 3))
    found["written"] = distributed.value(parameters[0]).clone()
    return found


def _everything(p: nn.Parameter, optimizer: Any) -> dict[str, Tensor | None]:
    return {
        "value": distributed.value(p).clone(),
        "gradient": _clone(distributed.gradient(p)),
        **_clones(distributed.moments(p, optimizer)),
    }


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in tensors.items()}


def ask_plainly() -> Found:
    """The answers of one process without any engine."""
    model = make_model()
    optimizer = make_optimizer(model)

    def backward() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()

    return ask(model, optimizer, backward, optimizer.step)


def assert_same(found: Found, plain: Found) -> None:
    """The answers of an engine are those of one process, but for how it keeps parameters."""
    own = ("kept by", "resizable", "is cut")
    for key, expected in plain.items():
        if key not in own:
            torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-7, msg=key)
