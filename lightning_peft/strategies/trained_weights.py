"""What methods share that train the model's own weights instead of adapters beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attach import AttachReport, match_targets
from lightning_peft.adapters.dense import is_quantized
from lightning_peft.errors import UserError
from lightning_peft.strategies.base import AdapterStrategy


class TrainedWeights(AdapterStrategy):
    """The weights of the target linears train; there are no adapters.

    Args:
        target_modules: The linears whose weights train.
        exclude_modules: Taken away from the targets.
        modules_to_save: Modules that train in full beside them.
    """

    def __init__(
        self,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        r: int = 1,
    ) -> None:
        super().__init__(
            r=r,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            modules_to_save=modules_to_save,
        )
        self._targets: dict[str, nn.Module] = {}
        self._original: dict[str, Tensor] = {}

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        """The linear itself, its weight set free."""
        if is_quantized(base):
            raise UserError(
                f"{type(self).__name__} trains the weights themselves, which a "
                f"{type(base).__name__} holds in a few levels only: give model.quantization: null, "
                "or an adapter."
            )
        base.weight.requires_grad_(True)  # type: ignore[union-attr]
        return base

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Freeze the model but for the targets, and remember how their weights began."""
        matched = match_targets(
            model, self.target_modules, self.exclude_modules, self.modules_to_save
        )
        report = super().attach(model, initialize)
        self._targets = {n: model.get_submodule(n) for names in matched.values() for n in names}
        self._original = {
            name: linear.weight.detach().to("cpu", copy=True)  # type: ignore[union-attr,operator]
            for name, linear in self._targets.items()
            if not linear.weight.is_meta  # type: ignore[union-attr]
        }
        return report

    @torch.no_grad()
    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """‖ΔW‖_F of each target against its weight at the start, scalars, in the model's order."""
        return {
            name: (linear.weight.float() - self._original[name].to(linear.weight).float()).norm()  # type: ignore[union-attr,operator,arg-type]
            for name, linear in self._targets.items()
        }
