"""What each process of a test of engines runs; imported by the processes, not a test itself."""

from __future__ import annotations

import functools
import logging
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft import distributed
from lightning_peft.adapters import adapter_layers, adapter_state_dict
from lightning_peft.datamodules.loading.loader import ResumableDataLoader
from lightning_peft.datamodules.loading.samplers import RandomBatchSampler
from lightning_peft.modules import CausalLMModule
from lightning_peft.runs import AtomicCheckpointIO
from lightning_peft.strategies import AdapterStrategy
from lightning_peft.testing import random_batch, tiny_llama

STEPS, ACCUMULATE = 20, 2
ROWS = 8  # of a micro-batch over all processes
processes = 1  # of the job, which `process` says


class Examples(Dataset):
    """Random rows of random length, as the data modules' sets give them."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.rows = [random_batch(first + i, rows=1) for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Any) -> list[dict[str, torch.Tensor]]:
        return [self.rows[i] for i in indices]

    def collate(self, rows: Any) -> dict[str, torch.Tensor]:
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    def count_targets(self, indices: Any) -> int:
        return sum(int((self.rows[i]["labels"][:, 1:] != -100).sum()) for i in indices)


class Data(LightningDataModule):
    def __init__(self, steps: int = STEPS) -> None:
        super().__init__()
        # The last window is short, as at the end of most epochs.
        self.examples = Examples((steps * ACCUMULATE - 1) * ROWS)

    def train_dataloader(self) -> ResumableDataLoader:
        rank, world = distributed.process_index(), distributed.world_size()
        sampler = RandomBatchSampler(len(self.examples), ROWS // world, 0, rank, world)
        return ResumableDataLoader(self.examples, sampler, accumulate=ACCUMULATE)

    def probe_dataloader(self, ratio: float) -> ResumableDataLoader:
        """Five batches of one process, or nine of half the size, all of them on each process."""
        data = Examples(36, first=5000)
        size = ROWS // distributed.world_size()
        return ResumableDataLoader(data, RandomBatchSampler(len(data), size))


class Tiny(CausalLMModule):
    """The module around a random LLaMA."""

    def load_base(self) -> Any:
        return tiny_llama()


class Watch(Checkpoint):  # which Lightning calls last
    """Remembers losses, and saves at a step."""

    def __init__(self, save_at: int | None = None, path: Path | None = None) -> None:
        self.losses: list[float] = []
        self.save_at, self.path = save_at, path
        self.dead_moments = 0.0

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step > len(self.losses) + getattr(self, "before", 0):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))
            if step == self.save_at:
                trainer.save_checkpoint(self.path)

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.before = trainer.global_step

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """The largest value, moment or gradient behind the living components."""
        largest = [0.0]
        for layer in adapter_layers(module.model).values():
            for parameter, dim in layer.components():
                found = distributed.moments(parameter, trainer.optimizers[0])
                for tensor in (distributed.value(parameter), *found.values()):
                    dead = tensor.narrow(dim, layer.rank, tensor.shape[dim] - layer.rank)
                    largest.append(float(dead.abs().max()) if dead.numel() else 0.0)
        self.dead_moments = max(largest)


def engine(name: str) -> Any:
    """The trainer's strategy."""
    from lightning_peft.engines import FSDP, DeepSpeed

    if name == "ddp":
        return "ddp"
    if name.startswith("zero"):
        return DeepSpeed(stage=int(name[-1]), logging_level=logging.ERROR)
    return FSDP() if name == "fsdp" else "auto"


def fit(
    name: str,
    adapter: AdapterStrategy,
    folder: Path,
    optimizer: str = "AdamW",
    save_at: int | None = None,
    resume: Path | None = None,
    path: Path | None = None,
    callbacks: Sequence[Any] = (),
    make: Callable[..., Any] = Tiny,
    strategy: Any = None,
    steps: int = STEPS,
    accelerator: str = "cpu",
    **more: Any,
) -> dict[str, Any]:
    """Train and tell what came out, the same words on every engine.

    ``make`` makes the module, ``strategy`` is the trainer's where its name does not tell, and
    ``more`` goes to the trainer.
    """
    torch.manual_seed(0)
    random.seed(0)
    module = make("tiny_llama", adapter=adapter, optimizer=OPTIMIZERS[optimizer])
    watch = Watch(save_at, path)
    made = Trainer(
        accelerator=accelerator,
        devices=processes,
        strategy=strategy or engine(name),
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        callbacks=[watch, *callbacks],
        **QUIET,
        **more,
    )
    made.ckpt_path = None if resume is None else str(resume)
    made.fit(module, Data(steps))
    shapes = {n: tuple(distributed.shape(layer.lora_A)) for n, layer in _layers(module).items()}
    return {
        "losses": watch.losses,
        "steps": made.global_step,
        "state": {k: v.detach().clone() for k, v in adapter_state_dict(module.model).items()},
        "deltas": _deltas(module),
        "ranks": {n: layer.rank for n, layer in _layers(module).items()},
        "shapes": shapes,
        "decisions": adapter.decisions,
        "dead": watch.dead_moments,
        "layout": getattr(adapter, "layout", None),
        "draw": distributed.everywhere(float(torch.rand(()))),
    }


def _layers(module: Any) -> dict[str, Any]:
    return adapter_layers(module.model)


def _deltas(module: Any) -> dict[str, Tensor]:
    """ΔW of each layer."""
    found = {}
    layers = _layers(module)
    parameters = [p for layer in layers.values() for p in layer.own_parameters()]
    with distributed.gathered(module.model, parameters):
        for name, layer in layers.items():
            found[name] = layer.delta_weight().clone()
    return found


Task = Callable[[str, int, Path], Any]
QUIET: dict[str, Any] = {
    **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
    "use_distributed_sampler": False,
}
OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2),
    "fused AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-1),
}


def process(rank: int, world: int, port: int, task: Task, name: str, folder: str) -> None:
    """One process: runs the task and leaves what it returns."""
    global processes
    processes = world
    os.environ.update(
        LOCAL_RANK=str(rank),
        RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo" if sys.platform == "linux" else "",
        OMP_NUM_THREADS="1",
    )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning_peft"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    result = task(name, rank, Path(folder))
    torch.save(result, Path(folder) / f"{name}-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(task: Task, name: str, folder: Path, world: int = 2) -> Any:
    """Begin a task in as many processes; torch's context of them.

    It does not look after them: those that wait for one that has gone are the test's to find.
    """
    import torch.multiprocessing as mp

    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["engine_preload"])
    arguments = (world, free_port(), task, name, str(folder))
    return mp.start_processes(
        process, arguments, nprocs=world, join=False, start_method="forkserver"
    )


def launch(task: Task, name: str, folder: Path, world: int = 2) -> list[Any]:
    """Run a task in as many processes, and return what each gave."""
    running = start(task, name, folder, world)
    while not running.join():
        pass
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]
