"""One file for each method."""

from lightning_peft.strategies.adalora import AdaLoRA
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.dora import DoRA
from lightning_peft.strategies.droplora import DropLoRA, LearnedRankMask, RankDropout, StepMask
from lightning_peft.strategies.dylora import DyLoRA
from lightning_peft.strategies.dynamic_rank_dora import DynamicRankDoRA
from lightning_peft.strategies.elalora import ElaLoRA
from lightning_peft.strategies.eva import EVA
from lightning_peft.strategies.fisher import FisherLoRA
from lightning_peft.strategies.full import FullFineTuning
from lightning_peft.strategies.galore import GaLore
from lightning_peft.strategies.gora import GoRA
from lightning_peft.strategies.increlora import IncreLoRA
from lightning_peft.strategies.layer_removal import LayerRemoval
from lightning_peft.strategies.lora import LoRA
from lightning_peft.strategies.lora_drop import LoRADrop
from lightning_peft.strategies.lora_fa import LoRAFA
from lightning_peft.strategies.lora_ga import LoRAGA
from lightning_peft.strategies.lora_plus import LoRAPlus
from lightning_peft.strategies.lora_prune import LoRAPrune
from lightning_peft.strategies.lora_xs import LoRAXS
from lightning_peft.strategies.milora import MiLoRA
from lightning_peft.strategies.olora import OLoRA
from lightning_peft.strategies.pissa import PiSSA
from lightning_peft.strategies.pruned_lora import PrunedLoRA
from lightning_peft.strategies.sora import SoRA
from lightning_peft.strategies.sparse_adapter import SparseAdapter
from lightning_peft.strategies.tied_lora import TiedLoRA
from lightning_peft.strategies.vera import VeRA

__all__ = [
    "AdaLoRA",
    "AdapterStrategy",
    "DoRA",
    "DropLoRA",
    "DyLoRA",
    "DynamicRankDoRA",
    "EVA",
    "ElaLoRA",
    "FisherLoRA",
    "FullFineTuning",
    "GaLore",
    "GoRA",
    "IncreLoRA",
    "LayerRemoval",
    "LearnedRankMask",
    "LoRA",
    "LoRADrop",
    "LoRAFA",
    "LoRAGA",
    "LoRAPlus",
    "LoRAPrune",
    "LoRAXS",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "PrunedLoRA",
    "RankDropout",
    "SoRA",
    "SparseAdapter",
    "StepMask",
    "TiedLoRA",
    "VeRA",
]
