"""One file for each method."""

from lightning_peft.strategies.adalora import AdaLoRA
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.dora import DoRA
from lightning_peft.strategies.droplora import DropLoRA, LearnedRankMask, RankDropout, StepMask
from lightning_peft.strategies.full import FullFineTuning
from lightning_peft.strategies.galore import GaLore
from lightning_peft.strategies.lora import LoRA
from lightning_peft.strategies.lora_drop import LoRADrop
from lightning_peft.strategies.milora import MiLoRA
from lightning_peft.strategies.pissa import PiSSA
from lightning_peft.strategies.pruned_lora import PrunedLoRA
from lightning_peft.strategies.sparse_adapter import SparseAdapter
from lightning_peft.strategies.tied_lora import TiedLoRA
from lightning_peft.strategies.vera import VeRA

__all__ = [
    "AdaLoRA",
    "AdapterStrategy",
    "DoRA",
    "DropLoRA",
    "FullFineTuning",
    "GaLore",
    "LearnedRankMask",
    "LoRA",
    "LoRADrop",
    "MiLoRA",
    "PiSSA",
    "PrunedLoRA",
    "RankDropout",
    "SparseAdapter",
    "StepMask",
    "TiedLoRA",
    "VeRA",
]
