"""One of each strategy, and of each mask, criterion and dropout with tensors of its own."""

from __future__ import annotations

from collections.abc import Callable

from lightning_peft import strategies

Make = Callable[[], strategies.AdapterStrategy]

PRUNING = {"r": 8, "target_r": 2, "start_step": 1, "prune_every": 2, "prune_count": 3}
ADALORA = {"r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 12}
STRATEGIES: dict[str, Make] = {
    "LoRA": lambda: strategies.LoRA(r=4),
    "LoRA, dropout": lambda: strategies.LoRA(r=4, lora_dropout=0.2),
    "LoRA, shared dropout": lambda: strategies.LoRA(r=4, lora_dropout=0.2, share_dropout=True),
    **{
        f"DropLoRA, {mask}": lambda mask=mask: strategies.DropLoRA(r=4, mask=mask)
        for mask in ("token", "sample", "batch", "step", "learned")
    },
    "PrunedLoRA": lambda: strategies.PrunedLoRA(**PRUNING, recovery="gradient"),
    "PrunedLoRA, sparsegpt": lambda: strategies.PrunedLoRA(
        **PRUNING, criterion="sparsegpt", recovery="activation"
    ),
    "PrunedLoRA, globally": lambda: strategies.PrunedLoRA(**PRUNING, allocation="global"),
    "LoRADrop": lambda: strategies.LoRADrop(r=4, threshold=0.6, probe_epochs=1),
    "DoRA": lambda: strategies.DoRA(r=4),
    "PiSSA": lambda: strategies.PiSSA(r=4),
    "MiLoRA": lambda: strategies.MiLoRA(r=4),
    "VeRA": lambda: strategies.VeRA(r=8),
    "TiedLoRA": lambda: strategies.TiedLoRA(r=4),
    "SparseAdapter": lambda: strategies.SparseAdapter(r=4, start_step=2),
    "AdaLoRA": lambda: strategies.AdaLoRA(**ADALORA),
    "GaLore": lambda: strategies.GaLore(r=4, update_proj_gap=2),
    "FullFineTuning": lambda: strategies.FullFineTuning(),
}
