"""Lightning's engines for many devices, as adapters need them.

``ddp`` is Lightning's own. :class:`DeepSpeed` and :class:`FSDP` are Lightning's with four changes.
They run on CPUs too. Their checkpoints are one file in the form of one device's (adapters, moments,
counters; no base weights), so that every engine goes on from any other's, on any number of devices.
Under DeepSpeed the loss is divided by the accumulation once, and the optimizer steps at a short
last window as it does everywhere else. FSDP2 cuts the model here, adapters in one group of their
own, so that layers can share them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.dense import is_quantized
from lightning_peft.engines.processes import LOST
from lightning_peft.errors import UserError
from lightning_peft.strategies.base import AdapterStrategy

# What an engine gives a strategy; see AdapterStrategy.needs.
WHOLE_WEIGHTS, WHOLE_STEPS = "whole weights", "whole steps"
# Which every engine gives, if need be by loading the base whole before it is cut.
WEIGHTS_AT_ATTACH = "weights at attach"
ENGINES = {
    "one device": {WHOLE_WEIGHTS, WHOLE_STEPS},
    "DDP": {WHOLE_WEIGHTS, WHOLE_STEPS},
    "DeepSpeed ZeRO-1": {WHOLE_WEIGHTS},
    "DeepSpeed ZeRO-2": {WHOLE_WEIGHTS},
    "DeepSpeed ZeRO-3": set(),
    "FSDP2": set(),
}


class _OneFile(ParallelStrategy):
    """Checkpoints as one device writes them: the module fills in what it gathers.

    The module's ``on_save_checkpoint`` runs on all processes and puts adapters and optimizer state
    into the checkpoint; the first process writes it.
    """

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Load into what the engine has wrapped."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is in the checkpoint."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: the module fills it in."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: the module fills it in."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write one file, by the first process."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read the file, on every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Have the module write values where the engine keeps them."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizers their state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            distributed.load_optimizer_state(optimizer, state)


class DeepSpeed(_OneFile, DeepSpeedStrategy):
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
        self.on_cpu = not torch.cuda.is_available()
        if self.on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # From a configuration jsonargparse gives all of Lightning's arguments too. A log of batch
        # sizes would need one, and the loader's own cannot be asked for.
        if more.get("logging_batch_size_per_gpu", "auto") == "auto":
            more["logging_batch_size_per_gpu"] = 1
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


class FSDP(_OneFile, ModelParallelStrategy):
    """FSDP2: the base's weights are cut by decoder layer, adapters in one group.

    Args:
        process_group_backend: ``nccl`` on GPUs and ``gloo`` on CPUs when None.
    """

    def __init__(self, process_group_backend: str | None = None, **more: Any) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, **more
        )

    def setup_environment(self) -> None:
        """Begin, with all devices in one data-parallel group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def cut(self, model: nn.Module) -> None:
        """Cut a model's weights, once adapters are attached and layers shared.

        Args:
            model: The adapted model. Quantized weights, whose packed form cannot be cut, stay whole
                on every device.
        """
        from torch.distributed.fsdp import fully_shard

        options: Any = {"mesh": self.device_mesh["data_parallel"], "reshard_after_forward": True}
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and is_quantized(m)]
        whole = {p for linear in linears for p in linear.parameters()}
        # One parameter in two groups would become two: adapters, which layers may share, and
        # modules that train with them are one group, the root's. It comes first, since a group
        # takes nothing from modules that are cut already.
        own = {p for layer in adapter_layers(model).values() for p in layer.own_parameters()}
        # A group has one dtype: over a half-precision base a trained head is cut like the base.
        dtypes = {p.dtype for p in own}
        own |= {p for p in model.parameters() if p.requires_grad and p.dtype in dtypes}
        base = set(model.parameters()) - own
        fully_shard(model, ignored_params=base, **options)
        for group in _groups(model, base - whole):
            taken = {p for block in group for p in block.parameters() if p not in base} | whole
            fully_shard(group, ignored_params=taken, **options)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is cut together: a transformer's repeated blocks, and each leaf outside of them."""
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, nn.ModuleList):
            inside += (f"{name}.",)
            found += list(module)
        elif any(True for _ in module.parameters(recurse=False)):
            inside += (f"{name}.",)
            found.append(module)
    return found


def _groups(model: nn.Module, parameters: set[nn.Parameter]) -> list[list[nn.Module]]:
    """What is cut together of some parameters: single blocks, but those that share one."""
    groups: list[list[nn.Module]] = []
    for block in _blocks(model):
        own = parameters & set(block.parameters())
        sharing = [g for g in groups if any(own & set(other.parameters()) for other in g)]
        if own:
            groups = [g for g in groups if g not in sharing]
            groups.append([*(b for g in sharing for b in g), block])
    return groups


def cut(engine: Any, model: nn.Module) -> None:
    """Have an engine that cuts models itself do so."""
    if isinstance(engine, FSDP):
        engine.cut(model)


def cut_parameter(engine: Any, parameter: nn.Parameter) -> None:
    """Have an engine that cuts single parameters do so."""
    if isinstance(engine, DeepSpeed) and engine.stage == 3:
        engine.cut_parameter(parameter)


def cuts_before_probe(engine: Any) -> bool:
    """Whether weights are to be held in shares from the start, so that nothing can be probed."""
    return isinstance(engine, DeepSpeed) and engine.stage == 3


def fills_shares(engine: Any) -> bool:
    """Whether a model without values can be cut, for each process to read its own share."""
    return isinstance(engine, FSDP) or cuts_before_probe(engine)


def restores_late(engine: Any) -> bool:
    """Whether a checkpoint is loaded only after the engine has wrapped the model."""
    return isinstance(engine, _OneFile)


def name_of(engine: Any) -> str:
    """An engine's name in sentences and in the table of what each gives."""
    if isinstance(engine, DeepSpeedStrategy):
        return f"DeepSpeed ZeRO-{engine.config['zero_optimization']['stage']}"  # type: ignore[index]
    if isinstance(engine, ModelParallelStrategy):
        return "FSDP2"
    return "DDP" if isinstance(engine, ParallelStrategy) else "one device"


def check(engine: Any, adapter: AdapterStrategy) -> None:
    """Refuse what an engine cannot run, before anything is loaded.

    Args:
        engine: The trainer's strategy.
        adapter: The method.

    Raises:
        UserError: In one sentence that names those that can.
    """
    if isinstance(engine, DeepSpeedStrategy) and not isinstance(engine, DeepSpeed):
        raise UserError(_instead(engine, "lightning_peft.engines.DeepSpeed", "deepspeed_z2.yaml"))
    if isinstance(engine, (FSDPStrategy, ModelParallelStrategy)) and not isinstance(engine, FSDP):
        raise UserError(_instead(engine, "lightning_peft.engines.FSDP", "fsdp.yaml"))
    if not isinstance(engine, (DDPStrategy, FSDP)) and isinstance(engine, ParallelStrategy):
        raise UserError(_instead(engine, "ddp", "ddp.yaml"))
    present = name_of(engine)
    needs = adapter.needs - {WEIGHTS_AT_ATTACH}
    missing = needs - ENGINES[present]
    if missing:
        able = [name for name, gives in ENGINES.items() if needs <= gives]
        raise UserError(
            f"{type(adapter).__name__} needs {' and '.join(sorted(missing))}, which {present} "
            f"holds in shares; {', '.join(able[:-1])} and {able[-1]} can run it."
        )


def _instead(engine: Any, use: str, file: str) -> str:
    return (
        f"trainer.strategy: checkpoints of Lightning's {type(engine).__name__} go to no other "
        f"engine; give {use} (--config configs/trainer/{file}, laid over the experiment)."
    )


def explain(error: BaseException) -> str | None:
    """What went wrong between processes, in one sentence; None for other errors."""
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        port = os.environ.get("MASTER_PORT", "of the rendezvous")
        return (
            f"the port {port}, by which the processes find each other, is in use; set MASTER_PORT "
            "to a free one, or unset it to have one chosen."
        )
    lost = ("Connection closed by peer", "Connection reset by peer", "remote process has failed")
    if any(sign in text for sign in lost):
        return LOST
    return None
