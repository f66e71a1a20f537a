"""The estimate of a whole run: every stage in its order, on one adapted model."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from lightning_peft.adapters import adapter_state_dict, trainable_parameters
from lightning_peft.errors import UserError
from lightning_peft.estimation.activations import measure_activations
from lightning_peft.estimation.files import checkpoint_bytes, export_bytes
from lightning_peft.estimation.memory import base_bytes, nbytes, value_bytes
from lightning_peft.estimation.optimizer import optimizer_state
from lightning_peft.modules.adapted import AdaptedModule
from lightning_peft.modules.meta import meta_base


@dataclass(frozen=True)
class Estimate:
    """Counts of values, and sizes in bytes on one device without sharding.

    Attributes:
        total: Parameters of the adapted model.
        trainable: Those that train at the start.
        trainable_end: Those that train at the end; None where only data decide.
        base: Bytes of what does not train, buffers included.
        trained: Bytes of what trains.
        gradients: Bytes of its gradients.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes that the forward pass of one micro-batch keeps for the backward pass.
        checkpoint: Bytes of a checkpoint's file at the start's ranks, without what a strategy keeps
            beside its tensors.
        export: Bytes of the weights that a run leaves to take away; None where only data decide, or
            PEFT's format cannot hold them.
    """

    total: int
    trainable: int
    trainable_end: int | None
    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int
    export: int | None

    def per_device(self, devices: int = 1, zero_stage: int = 0) -> dict[str, float]:
        """Bytes of each kind on one of several devices.

        Args:
            devices: Among which ZeRO shards.
            zero_stage: 1 shards the optimizer's state, 2 also gradients, 3 also all parameters.

        Raises:
            UserError: If there is no such stage, or no device.
        """
        if zero_stage not in (0, 1, 2, 3):
            raise UserError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage}.")
        if devices < 1:
            raise UserError(f"devices must be at least 1, got {devices}.")
        parts = {
            "weights": (self.base + self.trained, 3),
            "gradients": (self.gradients, 2),
            "optimizer": (self.optimizer, 1),
            "activations": (self.activations, 4),
        }
        return {k: size / (devices if zero_stage >= s else 1) for k, (size, s) in parts.items()}


def estimate(module: AdaptedModule, rows: int, tokens: int, targets: int | None = None) -> Estimate:
    """Estimate a run.

    Args:
        module: As instantiated from a configuration, its model not loaded.
        rows: Of a micro-batch.
        tokens: Of each row.
        targets: Positions of each row that go through the output layer; all when None.

    Returns:
        The estimate.

    Raises:
        UserError: If there is no configuration of the model, or the strategy refuses it.
    """
    model = meta_base(module)
    module.adapter.attach(model, initialize=False)
    module.model = model
    trained = [p for p in model.parameters() if p.requires_grad]
    start = trainable_parameters(model, include_saved=True)
    state = optimizer_state(module, trained)
    kept = list(adapter_state_dict(model).values())
    activations = measure_activations(module, rows, tokens, targets)
    base, trained_bytes = base_bytes(model, getattr(module, "quantization", None)), nbytes(trained)
    total = sum(p.numel() for p in model.parameters())
    # Shrinking needs parameters that nobody else holds, as an optimizer's cycle does until then.
    del trained
    gc.collect()
    end = module.adapter.final_parameters(model)  # may shrink the model
    return Estimate(
        total=total,
        trainable=start,
        trainable_end=end,
        base=base,
        trained=trained_bytes,
        gradients=trained_bytes,
        optimizer=value_bytes(state),
        activations=activations,
        checkpoint=checkpoint_bytes(kept, state),
        export=None if end is None else export_bytes(model),
    )
