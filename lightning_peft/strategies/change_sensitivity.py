"""How much each layer's whole change matters to the loss, seen in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.pruning.exchange import change_sensitivity


class ChangeSensitivity:
    """Sums up ``Σ|ΔW ⊙ ∂L/∂ΔW|`` of each layer, a micro-batch at a time.

    ``∂L/∂ΔW`` is the product of the output's gradient and the input, a dense matrix that lives for
    a moment; the time is that of a backward pass in which the layer's own weight trains.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._watched: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def start(self, layers: Mapping[str, AdaptedLayer]) -> None:
        """Begin to watch layers in training, by name."""
        self._watched = list(layers.values())
        # Of bound methods, so that the copy of a model tells the copy of this object.
        hooks = {name: functools.partial(self._watch, name) for name in layers}
        self._hooks = [m.register_forward_hook(hooks[name]) for name, m in layers.items()]

    def stop(self) -> None:
        """Watch no more, and forget."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._watched, self._sums = [], [], {}

    def take(self, layers: Mapping[str, AdaptedLayer]) -> Tensor:
        """What was summed up since the last call, (layers,), its mean over processes.

        A layer that no forward visited (an idle expert) has zero.

        Raises:
            RuntimeError: If others are watched than these, as in a copy that was made without this
                object.
        """
        watched = {id(layer) for layer in self._watched}
        if watched and not any(id(layer) in watched for layer in layers.values()):
            raise RuntimeError(
                "the strategy was attached to other layers than it is called with; copy it "
                "together with its model: copy.deepcopy((model, strategy))."
            )
        sums, self._sums = self._sums, {}
        device = next(iter(layers.values())).weight.device
        found = [sums.get(name, torch.zeros(())).to(device, torch.float32) for name in layers]
        return distributed.mean(torch.stack(found))

    def _watch(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # A recomputed output has no gradient, and so is not seen twice.
        if layer.training and output.requires_grad and isinstance(layer, AdaptedLayer):
            output.register_hook(functools.partial(self._add, name, layer, args[0].detach()))

    @torch.no_grad()
    def _add(self, name: str, layer: AdaptedLayer, x: Tensor, grad: Tensor) -> None:
        """Add a micro-batch; ``x`` (..., d_in), ``grad`` (..., d_out)."""
        with torch.autocast(grad.device.type, enabled=False):
            change = layer.delta_weight()
            left, right = grad.flatten(0, -2).to(change), x.flatten(0, -2).to(change)
            found = change_sensitivity(change, left.T @ right)
        self._sums[name] = self._sums[name] + found if name in self._sums else found
