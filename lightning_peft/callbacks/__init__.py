"""Callbacks for any strategy."""

from lightning_peft.callbacks.checkpoints import Checkpoints
from lightning_peft.callbacks.importance import LayerImportance
from lightning_peft.callbacks.perturbation import WeightPerturbation
from lightning_peft.callbacks.run_record import RunRecord

__all__ = ["Checkpoints", "LayerImportance", "RunRecord", "WeightPerturbation"]
