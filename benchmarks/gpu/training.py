"""Tokens per second, model FLOPs utilisation and peak memory of each strategy.

    python benchmarks/gpu/training.py           # LLaMA-3-8B's shapes, bfloat16, one GPU
    torchrun --nproc_per_node 8 benchmarks/gpu/training.py    # ZeRO-2, or --engine ddp
    python benchmarks/gpu/training.py --tiny    # a smoke test, on a CPU too

Weights and data are random: the figures are of speed alone. FLOPs are those that forward and
backward need (6 for each trained and 4 for each frozen weight and token, attention beside it), so
that recomputation counts as time and not as work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import distributed, trainable_parameters
from lightning_peft.datamodules.loading.loader import ResumableDataLoader
from lightning_peft.datamodules.loading.samplers import RandomBatchSampler
from lightning_peft.engines import DeepSpeed
from lightning_peft.modules import CausalLMModule
from lightning_peft.strategies import AdapterStrategy, DropLoRA, LoRA, LoRADrop, PrunedLoRA

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Dense bfloat16, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


class RandomTokens(torch.utils.data.Dataset[Any]):
    """Rows of random tokens, all of one length, every position a target."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(vocabulary, (rows, length), generator=generator)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        """Return rows."""
        return self.ids[indices]

    def collate(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make a batch."""
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def count_targets(self, indices: Any) -> int:
        """Count the labels that are predicted."""
        return len(indices) * (self.ids.shape[1] - 1)


class Data(LightningDataModule):
    """Random tokens for a run, and for LoRA-drop's probe."""

    def __init__(self, options: argparse.Namespace, vocabulary: int) -> None:
        super().__init__()
        self.options, self.vocabulary = options, vocabulary

    def _loader(self, batches: int, rank: int, world: int) -> ResumableDataLoader:
        rows = batches * self.options.batch_size * world
        data = RandomTokens(rows, self.options.length, self.vocabulary)
        sampler = RandomBatchSampler(rows, self.options.batch_size, 0, rank, world)
        return ResumableDataLoader(data, sampler)

    def train_dataloader(self) -> ResumableDataLoader:
        """Batches for all steps."""
        return self._loader(
            self.options.steps, distributed.process_index(), distributed.world_size()
        )

    def probe_dataloader(self, ratio: float) -> ResumableDataLoader:
        """Two batches for each process."""
        return self._loader(2 * distributed.world_size(), 0, 1)


class RandomLlama(CausalLMModule):
    """A LLaMA of given shape with random weights."""

    shape: dict[str, int] = TINY

    def load_base(self) -> Any:
        """Make it where it will run, without a copy in another precision."""
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_default_dtype(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        with device if torch.cuda.is_available() else torch.device("cpu"):
            model = LlamaForCausalLM(LlamaConfig(**self.shape))
        torch.set_default_dtype(torch.float32)
        return model.train()


class Clock(Callback):
    """Times the steps after the first few."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.began, self.seconds = warmup, 0.0, 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Begin after the warm-up."""
        if index == self.warmup:
            self._wait()
            self.began = time.perf_counter()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop."""
        self._wait()
        self.seconds = time.perf_counter() - self.began

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def strategies(r: int) -> dict[str, AdapterStrategy]:
    """The strategies that are measured."""
    return {
        "LoRA": LoRA(r=r),
        "DropLoRA": DropLoRA(r=r, p=0.3),
        "PrunedLoRA": PrunedLoRA(r=2 * r, target_r=r, prune_every=1, prune_count=max(r // 2, 1)),
        "LoRADrop": LoRADrop(r=r, threshold=0.9, probe_epochs=1),
    }


def flops_per_token(shape: dict[str, int], length: int, trained: int) -> float:
    """Forward and backward: frozen weights need no gradient of their own."""
    h, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = h * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * inner
    frozen = shape["num_hidden_layers"] * layer + shape["vocab_size"] * h
    attention = shape["num_hidden_layers"] * 6 * length * h  # causal: half of 12
    return 4 * frozen + 6 * trained + attention


def measure(name: str, adapter: AdapterStrategy, options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps, and say how fast."""
    shape = TINY if options.tiny else LLAMA_3_8B
    RandomLlama.shape = shape
    module = RandomLlama("tiny_llama", adapter=adapter, gradient_checkpointing=options.recompute)
    clock, gpu = Clock(options.warmup), torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", 1))
    engines: dict[str, Any] = {"single": "auto", "ddp": "ddp"}
    engine = options.engine or ("zero2" if world > 1 else "single")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(
        accelerator="auto",
        devices=world,
        strategy=engines[engine] if engine in engines else DeepSpeed(stage=int(engine[-1])),
        max_steps=options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[clock],
    )
    trainer.fit(module, datamodule=Data(options, shape["vocab_size"]))
    tokens = (options.steps - options.warmup) * options.batch_size * options.length
    trained = trainable_parameters(module.model)
    rate = tokens / clock.seconds
    device = torch.cuda.get_device_name() if gpu else platform.processor() or "CPU"
    peak = next((v for k, v in PEAKS.items() if k in device), None)
    work = rate * flops_per_token(shape, options.length, trained)
    return {
        "strategy": name,
        "engine": engine,
        "devices": world,
        "device": device,
        "tokens_per_second_per_device": round(rate, 1),
        "mfu": None if peak is None else round(work / peak, 4),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "trained_parameters": trained,
    }


def main() -> None:
    """Measure each strategy, one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, for a smoke test")
    parser.add_argument("--engine", choices=["single", "ddp", "zero1", "zero2", "zero3"])
    parser.add_argument("--only", nargs="*", help="names of strategies")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    options = parser.parse_args()
    for name, adapter in strategies(options.r).items():
        if options.only and name not in options.only:
            continue
        found = measure(name, adapter, options)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
