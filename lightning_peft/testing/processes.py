"""Several processes that average their gradients end alike."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_peft.adapters import adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies import AdapterStrategy
from lightning_peft.testing.loop import STEPS, Make, Run


def check_processes(make: Make, processes: int) -> None:
    """As many processes, each with its own data, end with equal parameters, ranks, decisions."""
    strategy = make()
    name, payload = type(strategy).__name__, _portable(strategy)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _start(payload, folder, processes)
        except torch.multiprocessing.ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            raise AssertionError(f"{name}: {processes} processes cannot train: {last}") from error
        results = [torch.load(Path(folder) / f"{index}.pt") for index in range(processes)]
    for other in results[1:]:
        _compare(name, results[0], other)


def _start(payload: bytes, folder: str, processes: int) -> None:
    """Train in forks of one process that has imported everything, where a system has them."""
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        imported = [__name__, "transformers.models.llama.modeling_llama"]
        multiprocessing.get_context(method).set_forkserver_preload(imported)
    torch.multiprocessing.start_processes(
        _train, (payload, folder, processes), nprocs=processes, start_method=method
    )


def _portable(strategy: AdapterStrategy) -> bytes:
    """The strategy as bytes that another process can read."""
    name = type(strategy).__name__
    try:
        payload = pickle.dumps(strategy)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"{name} cannot be sent to another process ({error}): give it named functions and "
            "classes of a module, no lambda."
        ) from error
    if b"__main__" in payload:
        raise UserError(
            f"{name} uses a class or function from __main__, which other processes cannot import: "
            "move it into a module of its own, or check it with processes=1."
        )
    return payload


def _train(index: int, payload: bytes, folder: str, processes: int) -> None:
    """One process: the same start on all, its own data and its own random stream afterwards."""
    from torch import distributed

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=processes
    )
    run = Run(lambda: pickle.loads(payload))
    run.prepare()
    torch.manual_seed(10 + index)
    stopped = None
    for step in range(STEPS):
        run.backward(processes * step + index)
        shapes: list[Any] = [None] * processes
        distributed.all_gather_object(shapes, {n: tuple(p.shape) for n, p in run.trained().items()})
        if any(other != shapes[0] for other in shapes):
            stopped = step
            break
        for parameter in run.trained().values():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            distributed.all_reduce(grad)
            parameter.grad = grad / processes
        run.update(step)
    result = {
        "stopped": stopped,
        "parameters": {name: p.detach() for name, p in run.trained().items()},
        "ranks": {name: layer.rank for name, layer in adapter_layers(run.model).items()},
        "decisions": run.strategy.decisions,
    }
    torch.save(result, Path(folder) / f"{index}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _compare(name: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    advice = "decide by what is equal on all: averaged gradients, parameters, reduced sums."
    for layer, rank in one["ranks"].items():
        if other["ranks"].get(layer) != rank:
            raise AssertionError(
                f"{name}: two processes disagree on the rank of {layer}, {rank} and "
                f"{other['ranks'].get(layer)}; {advice}"
            )
    for parameter, value in one["parameters"].items():
        found = other["parameters"].get(parameter)
        if found is None or not torch.equal(found, value):
            raise AssertionError(
                f"{name}: two processes end with different values of {parameter}; {advice}"
            )
    if one["decisions"] != other["decisions"] or one["stopped"] is not None:
        raise AssertionError(f"{name}: two processes remember different decisions; {advice}")
