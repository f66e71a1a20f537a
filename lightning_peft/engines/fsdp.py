"""FSDP2: Lightning's engine, which cuts an adapted model here.

Adapters are one group of their own, so that layers can share them.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.dense import is_quantized
from lightning_peft.engines.one_file import OneFile


class FSDP(OneFile, ModelParallelStrategy):
    """FSDP2: the base's weights are cut by decoder layer, adapters in one group.

    Args:
        process_group_backend: ``nccl`` on GPUs and ``gloo`` on CPUs when None.
    """

    def __init__(self, process_group_backend: str | None = None, **more: Any) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, **more
        )

    @property
    def name(self) -> str:
        """As it is called everywhere."""
        return "FSDP2"

    @property
    def fills_shares(self) -> bool:
        """Yes: it is cut before it has values."""
        return True

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
        for group in cut_together(model, base - whole):
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


def cut_together(model: nn.Module, parameters: set[nn.Parameter]) -> list[list[nn.Module]]:
    """What is cut together of some parameters: single blocks, but those that share one."""
    groups: list[list[nn.Module]] = []
    for block in _blocks(model):
        own = parameters & set(block.parameters())
        sharing = [g for g in groups if any(own & set(other.parameters()) for other in g)]
        if own:
            groups = [g for g in groups if g not in sharing]
            groups.append([*(b for g in sharing for b in g), block])
    return groups
