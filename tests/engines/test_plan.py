"""The planning page's formulas, against what two processes really hold and send."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import distributed
from lightning_peft.adapters import adapter_state_dict
from lightning_peft.modules.checkpoint import checkpoint_of, optimizer_states
from lightning_peft.strategies import LoRA, PrunedLoRA

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]
plan = importlib.import_module("plan")

PARAMETERS = {"7B": 6_738_415_616, "8B": 8_030_261_248, "70B": 70_553_706_496}


class Count(Callback):
    """Bytes that lie on this process before a step."""

    def __init__(self) -> None:
        self.held: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._count(trainer, module)

    def _count(self, trainer: Any, module: Any) -> None:
        base = {id(p) for p in module.parameters() if not p.requires_grad}
        own = [p for p in module.parameters() if p.requires_grad]
        self.held = {
            "weights": float(sum(local(p) for p in module.parameters() if id(p) in base)),
            "adapters": float(sum(local(p) for p in own)),
        }
        held = trainer.optimizers[0]
        inner = getattr(held, "optimizer", held)
        stepped = list(inner.state)  # ZeRO-3 gives its groups only while it steps
        tensors = [
            v for s in inner.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()
        ]
        self.held["moments"] = float(sum(local(v) for v in tensors))
        if not any(p is q for p in stepped for q in own):
            self.held["adapters"] += float(sum(local(p) for p in stepped))


def local(tensor: Any) -> int:
    """Bytes of a tensor on this process."""
    piece = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    piece = getattr(piece, "ds_tensor", piece)
    return piece.numel() * piece.element_size()


class Sent(TorchDispatchMode):
    """Adds up what collectives move, as rings would: see :func:`plan.plan`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, ring = str(func), (distributed.world_size() - 1) / distributed.world_size()
            if "allreduce" in kind:
                self.bytes += 2 * ring * size(args[0])
            elif "reduce_scatter" in kind:
                self.bytes += ring * size(args[1])
            elif "gather" in kind:
                self.bytes += ring * size(args[0])
            else:
                self.bytes += size(args[0])
        return func(*args, **(kwargs or {}))


def size(tensors: Any) -> int:
    if torch.is_tensor(tensors):
        return tensors.numel() * tensors.element_size()
    return sum(size(t) for t in tensors)


class Traffic(Callback):
    """What one window of two micro-batches sends: by the first one, and by both and the step."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 4:
            self.mode = Sent()
            self.mode.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        index = args[-1]
        if index == 4:
            self.first = self.mode.bytes
        if index == 5:
            self.mode.__exit__(None, None, None)


def measure(name: str, rank: int, folder: Path) -> dict[str, Any]:
    made = engine_worker.engine(name)
    if name == "zero3":  # by default it keeps small weights whole, and large ones for a while
        kept = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        made.config["zero_optimization"].update({f"stage3_{key}": 0 for key in kept})
    engine_worker.engine = lambda name: made
    count, traffic = Count(), Traffic()
    done = engine_worker.fit(name, LoRA(r=4), folder, callbacks=[count, traffic])
    sent = {"batch_traffic": traffic.first, "window": traffic.mode.bytes}
    return {**count.held, **sent, "steps": done["steps"]}


@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        "zero2",
        "fsdp",
        pytest.param("zero3", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.long),
    ],
)
def test_what_a_device_holds_and_sends_is_what_the_plan_says(name: str, tmp_path: Path) -> None:
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    from lightning_peft.testing import tiny_llama

    model = tiny_llama()
    base = sum(p.numel() for p in model.parameters())
    LoRA(r=4).attach(model)
    adapters = sum(t.numel() for t in adapter_state_dict(model).values())
    embedding = model.get_input_embeddings().weight.numel()
    expected = plan.plan(name, base, adapters, 2, base_bytes=4, embedding=embedding)
    window = 2 * expected.batch_traffic + expected.step_traffic
    for found in engine_worker.launch(measure, name, tmp_path):
        for key in ("weights", "adapters", "moments"):
            # Pieces are padded to whole numbers of devices.
            assert found[key] == pytest.approx(getattr(expected, key), rel=0.02), key
        # Beside it go a few numbers: losses, signals, agreement.
        assert found["batch_traffic"] == pytest.approx(expected.batch_traffic, rel=0.02, abs=100)
        assert found["window"] == pytest.approx(window, rel=0.02)


def test_counts_of_the_models() -> None:
    for name, count in PARAMETERS.items():
        assert plan.base_parameters(plan.MODELS[name]) == count
    kinds = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert plan.adapter_parameters(plan.LLAMA_2_7B, 32, kinds) == 56_098_816


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_one_device_sends_nothing(engine: str) -> None:
    alone = plan.plan(engine, 1000, 100, 1)
    assert alone.step_traffic == alone.batch_traffic == 0


def test_a_7b_checkpoint_is_adapter_and_moments() -> None:
    """On the meta device, by the code that writes checkpoints."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = plan.LLAMA_2_7B
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=32,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    strategy = PrunedLoRA(r=64, target_r=32)
    strategy.attach(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        moments = {key: torch.empty_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(1.0), **moments}
    entries = checkpoint_of(model, strategy, "model.", strategy.state_dict())
    entries.update(optimizer_states(model, [optimizer]))
    expected = plan.adapter_parameters(shape, 64)
    assert sum(t.numel() for t in entries["state_dict"].values()) == expected
    states = entries["optimizer_states"][0]["state"].values()
    assert sum(v.numel() for s in states for v in s.values() if v.dim()) == 2 * expected
    assert distributed.world_size() == 1


def test_the_benchmark_for_gpus_runs_on_a_tiny_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = importlib.import_module("training")
    words = "--tiny --only PrunedLoRA --r 4 --steps 4 --warmup 1 --length 16 --batch_size 2"
    monkeypatch.setattr(sys, "argv", ["training.py", *words.split()])
    gpu.main()
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("{"))
    found = json.loads(line)
    assert found["strategy"] == "PrunedLoRA"
    assert found["tokens_per_second_per_device"] > 0
    # 4 bfloat16 FLOPs for each frozen weight and 6 for each trained one, attention beside them.
    weights = plan.base_parameters(plan.LLAMA_3_8B)
    per_token = gpu.flops_per_token(gpu.LLAMA_3_8B, 0, 0)
    embedding_and_norms = (128256 + 65) * 4096
    assert per_token == 4 * (weights - embedding_and_norms)
