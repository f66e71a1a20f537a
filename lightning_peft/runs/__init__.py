"""A run's folder: claiming and finding it, its logger, and checkpoints that are written whole.

<root>/version_N/
    config.yaml  metrics.csv  importance.csv  importance.png  run.json
    adapter/  checkpoints/  predictions/
"""

from lightning_peft.runs.checkpoints import (
    AtomicCheckpointIO,
    check_checkpoint,
    read_checkpoint,
    step_of,
)
from lightning_peft.runs.finding import find_last, find_restart
from lightning_peft.runs.folders import RunFolder, claim_folder, folder_of, run_folder
from lightning_peft.runs.logger import RunLogger
from lightning_peft.runs.place import Place, find_place

__all__ = [
    "AtomicCheckpointIO",
    "Place",
    "RunFolder",
    "RunLogger",
    "check_checkpoint",
    "claim_folder",
    "find_last",
    "find_place",
    "find_restart",
    "folder_of",
    "read_checkpoint",
    "run_folder",
    "step_of",
]
