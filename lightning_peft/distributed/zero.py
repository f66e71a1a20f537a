"""DeepSpeed's ZeRO, and all that is read of DeepSpeed's private attributes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.distributed.keeper import Keeper
from lightning_peft.distributed.processes import process_index, sending_device, world_size


def mark_flat(optimizer: Any) -> None:
    """Let ZeRO-1's and 2's parameters know who has their flat copies; DeepSpeed tells only some."""
    for group in getattr(optimizer, "bit16_groups", ()):
        for parameter in group:
            parameter._flat_in = optimizer


class _Zero(Keeper):
    """What all stages share: the optimizer inside DeepSpeed's steps flat float32 shares."""

    @property
    @abstractmethod
    def zero(self) -> Any:
        """DeepSpeed's optimizer, which has the shares."""

    def holder(self, optimizer: Any) -> Any:
        """The optimizer that DeepSpeed's has inside."""
        return self.zero.optimizer

    def moment_keys(self, optimizer: Any) -> list[str]:
        """The entries of the flat share's shape, in the same order on all processes."""
        flat, state = self.stepped(), self.state(optimizer)
        return [k for k in sorted(state) if _is_like(state[k], flat)]

    def _tell_norm(self, share: Tensor) -> None:
        """Let DeepSpeed clip by a changed gradient; under offload it keeps the norms of all."""
        zero = self.zero
        zero.norm_for_param_grads[zero.get_param_id(self.parameter)] = share.double().norm()


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


class Zero12(_Zero):
    """ZeRO-1 and 2: whole values, and of a flat float32 copy each process has a share.

    A share holds pieces of parameters: ``_hp_mapping`` says which piece of a parameter lies where
    in it, and is None where this process has nothing of the parameter.
    """

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer, as :func:`mark_flat` has said."""
        return self.parameter._flat_in

    @staticmethod
    def keeps(parameter: nn.Parameter) -> bool:
        """Whether a flat copy is known (:func:`mark_flat`)."""
        return hasattr(parameter, "_flat_in")

    @staticmethod
    def groups(optimizer: Any) -> list[list[nn.Parameter]] | None:
        """The groups as they were given."""
        groups = getattr(optimizer, "bit16_groups", None)
        return None if groups is None else [list(group) for group in groups]

    def value(self) -> Tensor:
        """The value itself, not a copy."""
        return self.parameter.detach()

    def write(self, full: Tensor) -> None:
        """Set the value and this process' piece of the flat copy."""
        self.parameter.data.copy_(full)
        self._write(self.stepped(), full)

    def gradient(self) -> Tensor | None:
        """The gradient of the flat copy; None before the first backward pass."""
        from deepspeed.utils import safe_get_full_grad

        there = self.zero.cpu_offload or self.zero.averaged_gradients
        return safe_get_full_grad(self.parameter) if there else None

    def write_gradient(self, full: Tensor) -> None:
        """Set this process' piece of the gradient."""
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(self.parameter, full)
        pieces = self._pieces()
        if self.zero.cpu_offload and pieces is not None:
            self._tell_norm(full.reshape(-1).narrow(0, pieces[0].start, pieces[0].numel))

    def stepped(self) -> Tensor:
        """This process' share of the flat copy of the parameter's group."""
        groups = enumerate(self.zero.bit16_groups)
        index = next(i for i, group in groups if any(q is self.parameter for q in group))
        return self.zero.single_partition_of_fp32_groups[index]

    def moments(self, optimizer: Any) -> dict[str, Tensor]:
        """Put together of all processes' pieces."""
        state = self.state(optimizer)
        return {key: self._read(state[key]) for key in self.moment_keys(optimizer)}

    def write_moment(self, optimizer: Any, key: str, full: Tensor) -> None:
        """Set this process' piece of a moment."""
        self.begin_moment(optimizer, key, full.dtype)
        self._write(self.state(optimizer)[key], full)

    def _read(self, share: Tensor) -> Tensor:
        full = torch.zeros(self.parameter.numel(), dtype=share.dtype, device=sending_device())
        pieces = self._pieces()
        if pieces is not None:
            own, there = pieces
            full.narrow(0, own.start, own.numel).copy_(share.narrow(0, there.start, there.numel))
        dist.all_reduce(full)
        return full.view(self.parameter.shape)

    def _write(self, share: Tensor, full: Tensor) -> None:
        pieces = self._pieces()
        if pieces is not None:
            own, there = pieces
            piece = full.reshape(-1).narrow(0, own.start, own.numel)
            share.data.narrow(0, there.start, there.numel).copy_(piece)

    def _pieces(self) -> tuple[Any, Any] | None:
        """Where this process' piece begins, and how long it is: in the parameter, in the share."""
        mapping = self.parameter._hp_mapping
        if mapping is None:
            return None
        return mapping.lp_fragment_address, mapping.hp_fragment_address


class Zero3(_Zero):
    """ZeRO-3: every parameter is flattened, padded, and cut into as many pieces as processes."""

    is_cut = True

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return self.parameter._z3_optimizer

    @staticmethod
    def keeps(parameter: nn.Parameter) -> bool:
        """Whether DeepSpeed has made it one of its own."""
        return hasattr(parameter, "ds_id")

    @staticmethod
    def groups(optimizer: Any) -> list[list[nn.Parameter]] | None:
        """The groups as they were given, put together of the subgroups that they are cut into."""
        subgroups = getattr(optimizer, "fp16_groups", None)
        if subgroups is None:
            return None
        found: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
        for index, subgroup in enumerate(subgroups):
            found[optimizer.sub_group_to_group_id[index]] += subgroup
        return found

    @staticmethod
    def gathered(
        model: nn.Module, parameters: Sequence[nn.Parameter]
    ) -> AbstractContextManager[Any]:
        """Have these parameters whole."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    def shape(self) -> torch.Size:
        """The shape before it was cut."""
        return self.parameter.ds_shape

    def value(self) -> Tensor:
        """A copy of the value."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([self.parameter]):
            return self.parameter.detach().clone()

    def write(self, full: Tensor) -> None:
        """Set this process' pieces, of the value and of its float32 copy."""
        p = self.parameter
        self._write(p.ds_tensor, full)
        if p.requires_grad and hasattr(p, "_z3_optimizer"):
            self._write(self.zero._get_fp32_opt_state_partition(p, False)[0], full)

    def gradient(self) -> Tensor | None:
        """The gradient of the float32 copy."""
        return self.zero.get_fp32_grad_for_param(self.parameter)

    def write_gradient(self, full: Tensor) -> None:
        """Set this process' piece of the gradient."""
        share = self.zero._get_fp32_grad_state_partition(self.parameter, False)[0]
        self._write(share, full)
        if self.zero.offload_optimizer:
            self._tell_norm(share)

    def stepped(self) -> Tensor:
        """This process' flat share of the subgroup that the parameter is in."""
        index = self.zero.grad_position[self.zero.get_param_id(self.parameter)][0]
        return self.zero.fp32_partitioned_groups_flat[index]

    def moments(self, optimizer: Any) -> dict[str, Tensor]:
        """As DeepSpeed gathers them, which knows what it has moved elsewhere."""
        read = self.zero.get_full_hp_param
        return {key: read(self.parameter, key) for key in self.moment_keys(optimizer)}

    def write_moment(self, optimizer: Any, key: str, full: Tensor) -> None:
        """Set this process' piece of a moment."""
        self.begin_moment(optimizer, key, full.dtype)
        share = self.zero._get_fp32_opt_state_partition(self.parameter, False, key)[0]
        self._write(share, full)

    def _write(self, share: Tensor, full: Tensor) -> None:
        padded = torch.zeros(share.numel() * world_size(), dtype=share.dtype)
        padded[: full.numel()] = full.reshape(-1)
        share.data.copy_(padded.view(world_size(), -1)[process_index()].view(share.shape))
