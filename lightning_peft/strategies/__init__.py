"""One file for each method."""

from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.droplora import DropLoRA, LearnedRankMask, RankDropout, StepMask
from lightning_peft.strategies.lora import LoRA
from lightning_peft.strategies.lora_drop import LoRADrop
from lightning_peft.strategies.pruned_lora import PrunedLoRA

__all__ = [
    "AdapterStrategy",
    "DropLoRA",
    "LearnedRankMask",
    "LoRA",
    "LoRADrop",
    "PrunedLoRA",
    "RankDropout",
    "StepMask",
]
