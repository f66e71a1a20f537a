"""What strategies ask of several devices, whatever engine runs them.

The one file that knows how engines keep parameters, gradients and optimizer state: whole (one
device, DDP), whole with flat shares of gradients and moments (ZeRO-1 and 2), or in shares
altogether (ZeRO-3, FSDP2). A strategy asks for the full gradient, for a sum over processes, for one
draw that all take, and has all processes compare what they decided; on one process each of these
is the plain thing and costs nothing.

Every function that returns something full or reduced is a collective: all processes call it, in
the same order. The Lightning strategies that start the engines stand in
:mod:`lightning_peft.engines`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_peft.errors import UserError

Change = Callable[[Tensor], Tensor]


# Processes.


def is_distributed() -> bool:
    """Whether a process group is up, be it of one process."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if is_distributed() else 0


def _device() -> torch.device:
    """Where tensors must lie to be sent."""
    on_gpu = distributed.get_backend() == "nccl"
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
    dtype = max((t.dtype for t in tensors), key=lambda d: d.itemsize)
    flat = torch.cat([t.detach().reshape(-1).to(_device(), dtype) for t in tensors])
    distributed.all_reduce(flat)
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
    sent = tensor.detach().to(_device(), copy=True)
    distributed.broadcast(sent, 0)
    return sent.to(tensor.device)


def everywhere(value: Any) -> list[Any]:
    """What each process holds, in order; plain values and small tensors."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    sent = torch.tensor(number, device=_device())
    distributed.all_reduce(sent, distributed.ReduceOp.MAX)
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
        store = distributed.distributed_c10d._get_default_store()
        for meeting in ("come", "gone"):
            if store.add(f"lightning_peft/{meeting}", 1) == world_size():
                store.set(f"lightning_peft/all {meeting}", "")
            if meeting == "come" or rank() == 0:
                store.wait([f"lightning_peft/all {meeting}"], timedelta(seconds=seconds))


def shared_out(batches: Iterable[Any]) -> Iterator[Any]:
    """This process' share of batches that all processes iterate over alike.

    Yields:
        Of each group of as many batches as there are processes the one that falls to this process;
        None where the last group has none for it, so that all processes take the same steps.
    """
    count, mine = world_size(), rank()
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
    extremes = torch.tensor([digest, -digest], device=_device())
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
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


# How engines keep a parameter. Each class says the same six things of one.


class _Whole:
    """One device and DDP: everything is where PyTorch has it."""

    @staticmethod
    def shape(p: nn.Parameter) -> torch.Size:
        return p.shape

    @staticmethod
    def value(p: nn.Parameter) -> Tensor:
        return p.detach()

    @staticmethod
    def write(p: nn.Parameter, value: Tensor) -> None:
        p.data.copy_(value)

    @staticmethod
    def gradient(p: nn.Parameter) -> Tensor | None:
        return p.grad

    @staticmethod
    def write_gradient(p: nn.Parameter, value: Tensor) -> None:
        assert p.grad is not None
        p.grad.copy_(value)

    @staticmethod
    def moments(p: nn.Parameter, optimizer: Any) -> dict[str, Tensor]:
        state = optimizer.state.get(p, {})
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        found = {k: v for k, v in tensors.items() if v.shape == p.shape}
        packed = next((k for k, v in tensors.items() if k not in found and v.numel() > 1), None)
        if packed is not None:
            raise UserError(
                f"{type(optimizer).__name__} keeps {packed} in another shape than the parameter, "
                "so that single components or values cannot be taken out of it; give an optimizer "
                "with plain moments, such as torch.optim.AdamW."
            )
        return found

    @staticmethod
    def write_moment(p: nn.Parameter, optimizer: Any, key: str, value: Tensor) -> None:
        optimizer.state[p][key].copy_(value)


class _Fsdp(_Whole):
    """FSDP2: parameter, gradient and moments are cut along their first dimension."""

    @staticmethod
    def value(p: nn.Parameter) -> Tensor:
        return _full(p.detach())

    @staticmethod
    def write(p: nn.Parameter, value: Tensor) -> None:
        _write_share(p.detach(), value)

    @staticmethod
    def gradient(p: nn.Parameter) -> Tensor | None:
        return None if p.grad is None else _full(p.grad)

    @staticmethod
    def write_gradient(p: nn.Parameter, value: Tensor) -> None:
        assert p.grad is not None
        _write_share(p.grad, value)

    @staticmethod
    def moments(p: nn.Parameter, optimizer: Any) -> dict[str, Tensor]:
        return {k: _full(v) for k, v in _Whole.moments(p, optimizer).items()}

    @staticmethod
    def write_moment(p: nn.Parameter, optimizer: Any, key: str, value: Tensor) -> None:
        _write_share(optimizer.state[p][key], value)


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write_share(tensor: Any, value: Tensor) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(value)
        return
    value = value.to(tensor.device, tensor.dtype)
    mine = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(mine.to_local())


class _Zero12(_Whole):
    """ZeRO-1 and 2: whole values, and of a flat float32 copy each process has a share.

    A share holds pieces of parameters: ``_hp_mapping`` says which piece of a parameter lies where
    in it, and is None where this process has nothing of the parameter.
    """

    @staticmethod
    def write(p: nn.Parameter, value: Tensor) -> None:
        p.data.copy_(value)
        _Zero12._write(p, _Zero12._shares(p)[0], value)

    @staticmethod
    def gradient(p: nn.Parameter) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        zero: Any = p._flat_in  # type: ignore[attr-defined]
        there = zero.cpu_offload or zero.averaged_gradients
        return safe_get_full_grad(p) if there else None

    @staticmethod
    def write_gradient(p: nn.Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(p, value)
        zero: Any = p._flat_in  # type: ignore[attr-defined]
        if zero.cpu_offload and p._hp_mapping is not None:  # type: ignore[attr-defined]
            own = p._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
            _tell_norm(zero, p, value.reshape(-1).narrow(0, own.start, own.numel))

    @staticmethod
    def moments(p: nn.Parameter, optimizer: Any) -> dict[str, Tensor]:
        flat, state = _Zero12._shares(p)
        return {
            key: _Zero12._gather(p, state[key])
            for key in sorted(state)
            if isinstance(state[key], Tensor) and state[key].shape == flat.shape
        }

    @staticmethod
    def write_moment(p: nn.Parameter, optimizer: Any, key: str, value: Tensor) -> None:
        _Zero12._write(p, _Zero12._shares(p)[1][key], value)

    @staticmethod
    def _shares(p: Any) -> tuple[Tensor, dict[str, Any]]:
        """This process' share of the parameter's group, and the optimizer's state of it."""
        zero = p._flat_in
        group = next(i for i, g in enumerate(zero.bit16_groups) if any(q is p for q in g))
        flat = zero.single_partition_of_fp32_groups[group]
        return flat, zero.optimizer.state.get(flat, {})

    @staticmethod
    def _gather(p: Any, share: Tensor) -> Tensor:
        full = torch.zeros(p.numel(), dtype=share.dtype, device=_device())
        if p._hp_mapping is not None:
            own, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            full.narrow(0, own.start, own.numel).copy_(share.narrow(0, there.start, there.numel))
        distributed.all_reduce(full)
        return full.view(p.shape)

    @staticmethod
    def _write(p: Any, share: Tensor, value: Tensor) -> None:
        if p._hp_mapping is not None:
            own, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            piece = value.reshape(-1).narrow(0, own.start, own.numel)
            share.data.narrow(0, there.start, there.numel).copy_(piece)


class _Zero3(_Zero12):
    """ZeRO-3: every parameter is flattened, padded, and cut into as many pieces as processes."""

    @staticmethod
    def shape(p: Any) -> torch.Size:
        return p.ds_shape

    @staticmethod
    def value(p: nn.Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()

    @staticmethod
    def write(p: Any, value: Tensor) -> None:
        _Zero3._write(p, p.ds_tensor, value)
        if p.requires_grad and hasattr(p, "_z3_optimizer"):
            _Zero3._write(p, p._z3_optimizer._get_fp32_opt_state_partition(p, False)[0], value)

    @staticmethod
    def gradient(p: Any) -> Tensor | None:
        return p._z3_optimizer.get_fp32_grad_for_param(p)

    @staticmethod
    def write_gradient(p: Any, value: Tensor) -> None:
        share = p._z3_optimizer._get_fp32_grad_state_partition(p, False)[0]
        _Zero3._write(p, share, value)
        if p._z3_optimizer.offload_optimizer:
            _tell_norm(p._z3_optimizer, p, share)

    @staticmethod
    def moments(p: Any, optimizer: Any) -> dict[str, Tensor]:
        flat, state = _Zero3._shares(p)
        keys = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape]
        return {key: p._z3_optimizer.get_full_hp_param(p, key) for key in sorted(keys)}

    @staticmethod
    def write_moment(p: Any, optimizer: Any, key: str, value: Tensor) -> None:
        share = p._z3_optimizer._get_fp32_opt_state_partition(p, False, key)[0]
        _Zero3._write(p, share, value)

    @staticmethod
    def _shares(p: Any) -> tuple[Tensor, dict[str, Any]]:
        zero = p._z3_optimizer
        flat = zero.fp32_partitioned_groups_flat[zero.grad_position[zero.get_param_id(p)][0]]
        return flat, zero.optimizer.state.get(flat, {})

    @staticmethod
    def _write(p: Any, share: Tensor, value: Tensor) -> None:
        padded = torch.zeros(share.numel() * world_size(), dtype=share.dtype)
        padded[: value.numel()] = value.reshape(-1)
        share.data.copy_(padded.view(world_size(), -1)[rank()].view(share.shape))


def _tell_norm(zero: Any, p: nn.Parameter, share: Tensor) -> None:
    """Let DeepSpeed clip by a changed gradient; under offload it keeps the norms of all of them."""
    zero.norm_for_param_grads[zero.get_param_id(p)] = share.double().norm()


def _keeper(p: nn.Parameter) -> type[_Whole]:
    if isinstance(p, DTensor):
        return _Fsdp
    if hasattr(p, "ds_id"):
        return _Zero3
    if hasattr(p, "_flat_in"):
        return _Zero12
    return _Whole


# Parameters, gradients and moments under any engine.


def resizable(p: nn.Parameter) -> bool:
    """Whether a parameter may change its size: only where no engine has buckets of it."""
    return not is_distributed() and _keeper(p) is _Whole


def is_cut(p: nn.Parameter) -> bool:
    """Whether this process holds a piece of a parameter only."""
    return _keeper(p) in (_Fsdp, _Zero3)


def shape(p: nn.Parameter) -> torch.Size:
    """A parameter's shape, also where this process holds a piece of it."""
    return _keeper(p).shape(p)


@torch.no_grad()
def value(p: nn.Parameter) -> Tensor:
    """A parameter's full value, detached."""
    return _keeper(p).value(p)


@torch.no_grad()
def write(p: nn.Parameter, full: Tensor) -> None:
    """Set a parameter, the engine's own copies of it included."""
    _keeper(p).write(p, full)


@torch.no_grad()
def gradient(p: nn.Parameter) -> Tensor | None:
    """A parameter's full gradient, averaged over processes; None where none came.

    To be called after the backward pass of a whole accumulation window.
    """
    return _keeper(p).gradient(p)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of the full gradient of all these parameters, a scalar."""
    grads = [gradient(p) for p in parameters if p.requires_grad]
    return nn.utils.get_total_norm([grad for grad in grads if grad is not None])


@torch.no_grad()
def moments(p: nn.Parameter, optimizer: Any) -> dict[str, Tensor]:
    """What the optimizer remembers of each value of a parameter, in full, by key.

    Raises:
        UserError: If it packs values together (8-bit, factored), so that none can be taken out.
    """
    return _keeper(p).moments(p, optimizer)


@torch.no_grad()
def rewrite(p: nn.Parameter, change: Change, optimizer: Any = None) -> None:
    """Change a parameter, its gradient and its moments alike, each in full, sizes unchanged.

    Args:
        p: The parameter.
        change: From a full tensor to one of the same shape.
        optimizer: Whose moments follow; without it they stay as they are.
    """
    keeper = _keeper(p)
    keeper.write(p, change(keeper.value(p)))
    grad = keeper.gradient(p)
    if grad is not None:
        keeper.write_gradient(p, change(grad))
    for key, moment in keeper.moments(p, optimizer).items() if optimizer is not None else ():
        keeper.write_moment(p, optimizer, key, change(moment))


@contextmanager
def gathered(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have some parameters whole on all processes while the block runs, for reading.

    Args:
        model: The model, whose root holds them under FSDP2.
        parameters: The parameters; no value may be changed.
    """
    with ExitStack() as stack:
        cut = [p for p in parameters if _keeper(p) is _Zero3]
        if cut:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(cut))
        if any(_keeper(p) is _Fsdp for p in parameters):
            root: Any = model
            root.unshard()
            stack.callback(root.reshard)
        yield


# Optimizer state in torch's form, whole, so that it goes from one engine to another.


@torch.no_grad()
def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would be on one device."""
    groups, flat = _groups(optimizer), parameters_of(optimizer)
    if all(_keeper(p) is _Whole for p in flat):
        state = optimizer.state_dict()
        # Entries are changed later on; the optimizer's own must not be.
        return {**state, "state": {i: {**entry} for i, entry in state["state"].items()}}
    state = {}
    for index, p in enumerate(flat):
        keeper = _keeper(p)
        others = _other_state(p, optimizer)
        entry = {**others, **keeper.moments(p, optimizer)}
        if entry:
            state[index] = {
                key: v.cpu() if isinstance(v, Tensor) else v for key, v in entry.items()
            }
    first, described = 0, []
    for group, settings in zip(groups, optimizer.param_groups, strict=True):
        own = {key: v for key, v in settings.items() if key != "params"}
        described.append({**own, "params": list(range(first, first + len(group)))})
        first += len(group)
    return {"state": state, "param_groups": described}


@torch.no_grad()
def load_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Take back what :func:`optimizer_state` gave, written under whatever engine."""
    flat = parameters_of(optimizer)
    if all(_keeper(p) is _Whole for p in flat):
        optimizer.load_state_dict(saved)
        return
    for settings, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        settings.update({key: v for key, v in old.items() if key != "params"})
    for index, p in enumerate(flat):
        for key, v in saved["state"].get(index, {}).items():
            if isinstance(v, Tensor) and v.shape == shape(p) and v.dim():
                _begin_moment(p, optimizer, key, v)
                _keeper(p).write_moment(p, optimizer, key, v)
            else:
                _engine_state(p, optimizer)[key] = _placed(v, p, optimizer)


def mark_flat(optimizer: Any) -> None:
    """Let ZeRO-1's and 2's parameters know who has their flat copies; DeepSpeed tells only some."""
    for group in getattr(optimizer, "bit16_groups", ()):
        for parameter in group:
            parameter._flat_in = optimizer


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    """The model's parameters that an optimizer trains, in the order of its state's indices."""
    return [p for group in _groups(optimizer) for p in group]


def _groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """The model's own parameters by group, where the engine gave the optimizer flat ones."""
    if hasattr(optimizer, "bit16_groups"):  # ZeRO-1 and 2
        return [list(group) for group in optimizer.bit16_groups]
    if hasattr(optimizer, "fp16_groups"):  # ZeRO-3, whose groups are cut into subgroups
        return [[p for group in optimizer.fp16_groups for p in group]]
    return [list(group["params"]) for group in optimizer.param_groups]


def _engine_state(p: nn.Parameter, optimizer: Any) -> Any:
    """The state of what the optimizer steps in the parameter's place."""
    keeper = _keeper(p)
    if not issubclass(keeper, _Zero12):
        return optimizer.state[p]
    flat, _ = keeper._shares(p)
    zero: Any = p._z3_optimizer if keeper is _Zero3 else p._flat_in  # type: ignore[attr-defined]
    return zero.optimizer.state[flat]


def _other_state(p: nn.Parameter, optimizer: Any) -> dict[str, Any]:
    """What of the state has no shape of a parameter's, such as the number of steps."""
    return {
        key: v
        for key, v in _engine_state(p, optimizer).items()
        if not isinstance(v, Tensor) or v.dim() == 0
    }


def _placed(value: Any, p: nn.Parameter, optimizer: Any) -> Any:
    """What is no moment, where the optimizer has it: a fused one counts steps on the device."""
    if not isinstance(value, Tensor):
        return value
    groups, keeper = optimizer.param_groups, _keeper(p)
    if any(group.get("fused") or group.get("capturable") for group in groups):
        own = keeper._shares(p)[0] if issubclass(keeper, _Zero12) else p
        return value.to(own.device, torch.float32, copy=True)
    return value.clone()


def _begin_moment(p: nn.Parameter, optimizer: Any, key: str, like: Tensor) -> None:
    state = _engine_state(p, optimizer)
    if key not in state:
        keeper = _keeper(p)
        own = keeper._shares(p)[0] if issubclass(keeper, _Zero12) else p.detach()
        state[key] = torch.zeros_like(own, dtype=like.dtype)
