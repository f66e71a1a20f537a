"""Training steps of each method beside PEFT's, over one base: speed, share of peak, memory.

    python benchmarks/gpu/fast.py                     # LLaMA-3-8B's shapes, bfloat16
    python benchmarks/gpu/fast.py --shape 1b
    python benchmarks/gpu/fast.py --tiny --rounds 1   # a shape that takes seconds, on a CPU too

All cases adapt the same frozen weights, so that they fit one card, and take turns in an order that
is drawn anew for each round (see harness.py). After each round a line of what is known so far goes
to ``--output``: whenever it is stopped, the last line holds. Weights and data are random.

FLOPs are those that forward and backward need (6 for each trained and 4 for each frozen weight and
token, attention beside it); the share of peak is of the card's dense bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import interleave, machine, tensor_peak
from models import TARGETS, floor_step, train_step
from training import LLAMA_3_8B, PEAKS, TINY, flops_per_token

LLAMA_3_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHAPES = {"8b": LLAMA_3_8B, "1b": LLAMA_3_1B, "tiny": TINY}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[], None]


class Bench:
    """Cases over one base.

    Args:
        shape: Entries of a LLaMA's configuration.
        batch: Rows.
        tokens: Of a row.
        r: Rank.
    """

    def __init__(self, shape: dict[str, int], batch: int, tokens: int, r: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.shape, self.tokens, self.r = shape, tokens, r
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
        with DEVICE:
            self.base = LlamaForCausalLM(LlamaConfig(**shape)).requires_grad_(False).train()
        torch.set_default_dtype(before)
        ids = torch.randint(
            shape["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(1)
        ).to(DEVICE)
        self.batch = {"input_ids": ids, "labels": ids}

    def model(self) -> Any:
        """A model of its own modules, over the base's weights."""
        shared = {id(tensor): tensor for tensor in self.base.parameters()}
        return copy.deepcopy(self.base, shared)

    def floor(self) -> Step:
        """The frozen model: forward, and backward to its inputs."""
        return floor_step(self.model(), self.batch)

    def ours(self, name: str = "LoRA", before: int = 0, **more: Any) -> Step:
        """One of this package's strategies.

        Args:
            name: Its class.
            before: Steps to make before it is measured.
            more: Arguments beside rank and targets.
        """
        from lightning_peft import strategies

        model = self.model()
        strategy = getattr(strategies, name)(**{"r": self.r, "target_modules": TARGETS, **more})
        strategy.attach(model)
        strategy.prepare(
            model, lambda ratio: [self.batch], lambda b: model(**b).loss, torch.optim.AdamW
        )
        step = train_step(model.train(), self.batch, strategy)
        for _ in range(before):
            step()
        return step

    def peft(self, **more: Any) -> Step:
        """PEFT's LoRA."""
        import peft as library

        config = library.LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules=TARGETS, **more)
        return train_step(library.get_peft_model(self.model(), config), self.batch)

    def in_module(self) -> Step:
        """LoRA with the loss of this package's module, which makes no logits."""
        from lightning_peft.modules.causal_lm import CausalLMModule
        from lightning_peft.strategies import LoRA

        adapter = LoRA(r=self.r, target_modules=TARGETS)
        module = CausalLMModule("tiny_llama", adapter=adapter)
        module.model = self.model()
        adapter.attach(module.model)
        batch = {**self.batch, "attention_mask": torch.ones_like(self.batch["input_ids"])}

        def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            total, count = module.target_loss(batch)
            return total / count

        return train_step(module.model.train(), batch, adapter, loss=loss)

    def cases(self) -> dict[str, Callable[[], Step]]:
        """What makes each case, by name."""
        pruned = {"r": 4 * self.r, "target_r": self.r, "prune_every": 1, "start_step": 0}
        return {
            "floor": self.floor,
            "LoRA": self.ours,
            "PEFT LoRA": self.peft,
            "LoRA, no logits": self.in_module,
            "LoRA, dropout 0.05": lambda: self.ours(lora_dropout=0.05),
            "PEFT LoRA, dropout 0.05": lambda: self.peft(lora_dropout=0.05),
            "DropLoRA token": lambda: self.ours("DropLoRA", p=0.3),
            "DropLoRA batch": lambda: self.ours("DropLoRA", p=0.3, mask="batch"),
            "DropLoRA step": lambda: self.ours("DropLoRA", p=0.3, mask="step"),
            # At its first rank, and at its last after two removals.
            "PrunedLoRA, 4 r": lambda: self.ours("PrunedLoRA", **{**pruned, "start_step": 10**9}),
            "PrunedLoRA, at its end": lambda: self.ours(
                "PrunedLoRA", before=4, prune_count=3 * self.r // 2, **pruned
            ),
            "LoRA-drop": lambda: self.ours("LoRADrop", threshold=0.9, probe_epochs=1),
            "DoRA": lambda: self.ours("DoRA"),
            "PEFT DoRA": lambda: self.peft(use_dora=True),
        }


def summary(
    bench: Bench, steps: dict[str, Step], seconds: dict[str, list[float]], peaks: dict[str, int]
) -> dict[str, Any]:
    """What is known after some rounds."""
    count = bench.batch["input_ids"].numel()
    peak = next((v for k, v in PEAKS.items() if k in (machine()["gpu"] or "")), None)
    rows = []
    for name, taken in seconds.items():
        model = getattr(steps[name], "model", bench.base)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rate = count / statistics.median(taken)
        work = rate * flops_per_token(bench.shape, bench.tokens, trained)
        peer = "PEFT DoRA" if name == "DoRA" else "PEFT LoRA"
        peer += ", dropout 0.05" if "dropout" in name else ""
        against = [b / a for a, b in zip(taken, seconds.get(peer, []), strict=False)]
        rows.append(
            {
                "case": name,
                "tokens_per_second": round(rate, 1),
                "share_of_peak": None if peak is None else round(work / peak, 4),
                "speed_over_peft": round(statistics.median(against), 4) if against else None,
                "peak_memory_gb": round(peaks[name] / 2**30, 3),
                "trained": trained,
            }
        )
    rounds = len(next(iter(seconds.values())))
    return {"machine": machine(), "shape": bench.shape, "rounds": rounds, "rows": rows}


def main() -> None:
    """Measure round after round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--tiny", action="store_true", help="--shape tiny, few tokens, one round")
    parser.add_argument("--only", nargs="*", help="names of cases; floor and PEFT's come along")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.tiny:
        given.shape, given.r, given.batch, given.tokens, given.rounds = "tiny", 8, 2, 16, 1
    torch.manual_seed(0)
    bench = Bench(SHAPES[given.shape], given.batch, given.tokens, given.r)
    always = ("floor", "PEFT LoRA", "PEFT LoRA, dropout 0.05", "PEFT DoRA")
    wanted = {
        n: m for n, m in bench.cases().items() if not given.only or n in (*given.only, *always)
    }
    steps: dict[str, Step] = {}
    for name, make in wanted.items():
        try:
            steps[name] = make()
            steps[name]()
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name} is left out: {error}", flush=True)
            steps.pop(name, None)
    peaks = {name: tensor_peak(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(given.rounds):
        for name, taken in interleave(steps, rounds=1, warmup=0, seed=number).items():
            seconds[name] += taken
        line = json.dumps(summary(bench, steps, seconds, peaks))
        if given.output is None:
            print(line, flush=True)
        else:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            with given.output.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
