"""DeepSpeed's ZeRO: Lightning's engine with the changes that adapters need.

The loss is divided by the accumulation once, and the optimizer steps at a short last window as it
does everywhere else. It runs on CPUs too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.engines.needs import zero_name
from lightning_peft.engines.one_file import OneFile
from lightning_peft.errors import UserError


class DeepSpeed(OneFile, DeepSpeedStrategy):
    """DeepSpeed's ZeRO.

    Args:
        stage: 1 cuts the optimizer's state, 2 gradients too, 3 the weights too.
        offload_optimizer: Keep the optimizer's state in the hosts' memory.
        offload_parameters: With stage 3 keep weights in the hosts' memory.
        reduce_bucket_size: Elements that are reduced at once.
        exclude_frozen_parameters: Keep the base out of what DeepSpeed itself would save.
        process_group_backend: ``nccl`` on GPUs and ``gloo`` on CPUs when None.

    Raises:
        UserError: If deepspeed is not installed, ``stage`` is none of these, or offloading is
            asked for what is not cut, or to disks.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        reduce_bucket_size: int = 200_000_000,
        exclude_frozen_parameters: bool = True,
        process_group_backend: str | None = None,
        **more: Any,
    ) -> None:
        _refuse(stage, offload_parameters, more)
        self.on_cpu = not torch.cuda.is_available()
        if self.on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _give_batch_size(more)
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            reduce_bucket_size=reduce_bucket_size,
            process_group_backend=process_group_backend or ("gloo" if self.on_cpu else None),
            exclude_frozen_parameters=exclude_frozen_parameters,
            **more,
        )
        if offload_optimizer and isinstance(self.config, dict):
            # DeepSpeed would have its own optimizer, compiled; adapters are small enough for any.
            self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        self.stage = stage
        self._cut: Any = None

    @property
    def name(self) -> str:
        """By the stage in DeepSpeed's own configuration."""
        return zero_name(self)

    @property
    def cuts_when_building(self) -> bool:
        """With stage 3."""
        return self.stage == 3

    @property
    def fills_shares(self) -> bool:
        """With stage 3, which cuts parameters one by one."""
        return self.stage == 3

    @property
    def root_device(self) -> torch.device:
        """This process' device."""
        return torch.device("cpu", self.local_rank) if self.on_cpu else super().root_device

    def setup_environment(self) -> None:
        """Begin, without Lightning's check that there are GPUs."""
        if not self.on_cpu:
            super().setup_environment()
            return
        assert self.accelerator is not None
        self.accelerator.setup_device(torch.device("cpu"))
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Begin, without Lightning's check of the GPUs' indices."""
        if not self.on_cpu:
            super().setup_distributed()
            return
        import deepspeed.ops

        # Compiled at the first start, for inference only; a process killed meanwhile leaves a lock
        # at which all later ones wait for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Any) -> None:
        """Begin, and let parameters know where their flat copies are."""
        plugin: Any = self.precision_plugin
        if plugin.precision == "32-true":
            # Lightning would make a half-precision base float32, as its adapters are.
            plugin.convert_module = lambda module: module
        super().setup(trainer)
        for optimizer in self.optimizers:
            distributed.mark_flat(optimizer)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build the model as it is; weights are cut one by one, or when the engine begins."""
        yield

    def cut_parameter(self, parameter: nn.Parameter) -> None:
        """Cut one parameter now, as stage 3 else does with all of them when the engine begins."""
        if self.stage != 3:
            return
        import deepspeed

        if self._cut is None:
            self._init_config_if_needed()
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=self.config
            )
            self._cut = parameter
        else:
            self._cut.convert_to_zero_parameters(param_list=[parameter])

    @property
    def handles_gradient_accumulation(self) -> bool:
        """No: DeepSpeed would count past a short last window, and never step at it."""
        return False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Tell DeepSpeed whether this micro-batch ends a window."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(self._ends_window)
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Go backward; Lightning has divided by the accumulation already."""
        kwargs["scale_wrt_gas"] = False
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if not self._ends_window:
            self.deepspeed_engine.step()  # only counts the micro-batch
        return loss

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing: the boundary above says when gradients are reduced."""
        yield

    @property
    def _ends_window(self) -> bool:
        assert self.lightning_module is not None
        return not self.lightning_module.trainer.fit_loop._should_accumulate()


def _refuse(stage: int, offload_parameters: bool, more: Mapping[str, Any]) -> None:
    """Refuse what cannot be, by the arguments of :class:`DeepSpeed`."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "trainer.strategy: DeepSpeed needs the package deepspeed, which is not installed; "
            "pip install 'lightning-peft[deepspeed]', or lay configs/trainer/ddp.yaml over."
        )
    if stage not in (1, 2, 3):
        raise UserError(f"trainer.strategy.stage must be 1, 2 or 3, got {stage}.")
    if offload_parameters and stage != 3:
        raise UserError(
            f"trainer.strategy.offload_parameters needs stage 3, which cuts them, got {stage}."
        )
    for key in ("offload_optimizer_device", "offload_params_device"):
        if more.get(key, "cpu") != "cpu":
            raise UserError(
                f"trainer.strategy.{key} must be cpu, got {more[key]}: gradients and moments "
                "that lie on disks cannot be read here; leave it out."
            )


def _give_batch_size(more: dict[str, Any]) -> None:
    """Give a log of batch sizes one, in place; the loader's own cannot be asked for.

    From a configuration jsonargparse gives all of Lightning's arguments, so it may be there.
    """
    if more.get("logging_batch_size_per_gpu", "auto") == "auto":
        more["logging_batch_size_per_gpu"] = 1
