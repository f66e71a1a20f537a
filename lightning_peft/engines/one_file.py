"""Checkpoints in one file, as one device writes them: any engine goes on from any other's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy, Strategy

from lightning_peft import distributed
from lightning_peft.engines.needs import Traits


class OneFile(Traits, ParallelStrategy):
    """Checkpoints as one device writes them: the module fills in what it gathers.

    The module's ``on_save_checkpoint`` runs on all processes and puts adapters and optimizer state
    into the checkpoint; the first process writes it.
    """

    @property
    def restores_late(self) -> bool:
        """Yes: values go where the engine keeps them."""
        return True

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
