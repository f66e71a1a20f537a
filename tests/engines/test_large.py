"""Bases that are large for a device: read by shares, in few bits, in half precision, offloaded."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch
from engine_worker import fit
from lightning.pytorch import Callback

from lightning_peft.engines import DeepSpeed
from lightning_peft.modules import CausalLMModule, causal_lm
from lightning_peft.strategies import AdapterStrategy, DropLoRA, LoRA, PiSSA, PrunedLoRA
from lightning_peft.testing import random_batch, tiny_llama

Results = dict[str, Any]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
CUT = ["fsdp", pytest.param("zero3", marks=needs_deepspeed)]
SAVED_AFTER = 3
MASKS: tuple[Any, ...] = ("token", "sample", "batch", "step")


def of(folder: Path, kind: Any = CausalLMModule, **arguments: Any) -> Callable[..., Any]:
    """Makes a module over a base in a folder, in the place of the embedded one."""
    return lambda _, **given: kind(str(folder), **given, **arguments)


def pruned() -> PrunedLoRA:
    """Three removals, at steps 1, 2 and 3."""
    return PrunedLoRA(r=8, target_r=2, start_step=1, prune_every=1, prune_count=2)


def assert_equal(one: Results, other: Results) -> None:
    assert one["losses"] == other["losses"][-len(one["losses"]) :]
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), name


def assert_close(one: Results, other: Results, tolerance: float) -> None:
    reference = other["losses"][-len(one["losses"]) :]
    assert one["losses"] == pytest.approx(reference, rel=tolerance)
    assert one["deltas"].keys() == other["deltas"].keys()
    for name, value in one["deltas"].items():
        assert (value - other["deltas"][name]).norm() < 10 * tolerance * value.norm(), name
    assert one["decisions"] == other["decisions"]
    assert one["ranks"] == other["ranks"]


# The base is read by shares.


class Whole(CausalLMModule):
    """Has each process load the base whole, as any module with a loader of its own does."""

    def load_base(self) -> Any:
        return super().load_base()


class Logits(Callback):
    """What the model says before training."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        batch = random_batch(7)
        with torch.no_grad():
            module.eval()
            output = module.model(batch["input_ids"], attention_mask=batch["attention_mask"])
            self.found = output.logits.clone()
            module.train()


BASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "in parts": {"max_shard_size": "20KB"},
    "converted": {},
}


def save_bases(folder: Path) -> None:
    for name, saving in BASES.items():
        model = tiny_llama(tie_word_embeddings=name == "tied")
        model.save_pretrained(folder / name, **saving)
    assert (folder / "in parts" / "model.safetensors.index.json").is_file()


def adapter_of(base: str) -> AdapterStrategy:
    if base == "in parts":
        return LoRA(r=4, modules_to_save=["lm_head"])
    return DropLoRA(r=4, p=0.5) if base == "tied" else LoRA(r=4)


def read_by_shares(name: str, rank: int, folder: Path) -> Results:
    loads: list[str] = []
    load = causal_lm.load_causal_lm
    causal_lm.load_causal_lm = lambda *args, **more: loads.append("whole") or load(*args, **more)
    done: Results = {}
    for base in BASES:
        for kind in (Whole, CausalLMModule):
            key, say = f"{base}, {kind.__name__}", Logits()
            arguments = {"dtype": "bfloat16"} if base == "converted" else {}
            done[key] = fit(
                name,
                adapter_of(base),
                folder,
                callbacks=[say],
                make=of(folder / base, kind, **arguments),
                max_steps=3,
                save_at=2,
                path=folder / f"{name}-{key}.ckpt",
            )
            done[key] |= {"logits": say.found, "loads": loads[:]}
            loads.clear()
    done["resumed"] = fit(
        name,
        adapter_of("tied"),
        folder,
        make=of(folder / "tied"),
        resume=folder / f"{name}-tied, Whole.ckpt",
        max_steps=3,
    )
    done["resumed"]["loads"] = loads[:]
    fit(name, PiSSA(r=4), folder, make=of(folder / "tied"), max_steps=1)
    done["PiSSA"] = {"loads": loads[:]}
    return done


@pytest.mark.parametrize(
    "name", ["fsdp", pytest.param("zero3", marks=[needs_deepspeed, pytest.mark.slow])]
)
def test_a_base_read_by_shares_is_the_base_loaded_whole(name: str, tmp_path: Path) -> None:
    save_bases(tmp_path)
    for done in engine_worker.launch(read_by_shares, name, tmp_path):
        for base in BASES:
            whole, shares = done[f"{base}, Whole"], done[f"{base}, CausalLMModule"]
            assert (whole["loads"], shares["loads"]) == (["whole"], [])
            assert torch.equal(whole["logits"], shares["logits"])
            assert whole["losses"]
            assert_equal(whole, shares)
        # The checkpoint of a base that was loaded whole fits: fingerprints are the same.
        assert done["resumed"]["loads"] == []
        assert done["resumed"]["losses"] == done["tied, Whole"]["losses"][2:]
        assert done["PiSSA"]["loads"] == ["whole"]


class Measured(CausalLMModule):
    """Counts the bytes that building the model allocates."""

    def configure_model(self) -> None:
        with torch.profiler.profile(profile_memory=True) as profile:
            super().configure_model()
        held = self.peak = 0
        file = Path(self.model_name_or_path, "model.safetensors").stat().st_size
        for event in profile.profiler.kineto_results.events():
            # The mapped file is told as an allocation of its size, and is none.
            if event.name() == "[memory]" and abs(event.nbytes()) != file:
                held += event.nbytes()
                self.peak = max(self.peak, held)


def pieces_of(module: Any) -> list[torch.Tensor]:
    """What this process holds of the frozen parameters."""
    frozen = [p for p in module.parameters() if not p.requires_grad and not p.is_meta]
    pieces = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
    return [getattr(p, "ds_tensor", p) for p in pieces]


class Base(Callback):
    """Bytes of the base on this process, and its dtypes."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        pieces = pieces_of(module)
        self.bytes = sum(p.numel() * p.element_size() for p in pieces)
        self.dtypes = {p.dtype for p in pieces}
        self.trained = {p.dtype for p in module.parameters() if p.requires_grad}


def held_bytes(name: str, rank: int, folder: Path) -> Results:
    made: list[Any] = []

    def make(_: str, **given: Any) -> Any:
        made.append(Measured(str(folder / "large"), **given))
        return made[-1]

    while_cutting = [0]

    def cut(engine: DeepSpeed, parameter: Any) -> None:
        pieces = pieces_of(made[0].model)
        while_cutting.append(sum(p.numel() * p.element_size() for p in pieces))
        cut_parameter(engine, parameter)

    base, cut_parameter = Base(), DeepSpeed.cut_parameter
    DeepSpeed.cut_parameter = cut
    fit(name, LoRA(r=2), folder, make=make, max_steps=1, callbacks=[base])
    # Buffers of DeepSpeed's broadcasts are freed by another thread, which the profiler misses.
    peak = made[0].peak if name == "fsdp" else max(while_cutting)
    return {"peak": peak, "held": base.bytes}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.slow
def test_no_process_ever_holds_more_than_its_share_and_one_tensor(
    name: str, tmp_path: Path
) -> None:
    model = tiny_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "large")
    base = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    del model
    assert base > 180e6
    for found in engine_worker.launch(held_bytes, name, tmp_path):
        assert found["held"] == pytest.approx(base / 2, rel=0.01)
        assert base / 2 < found["peak"] < base / 2 + largest + 4e6  # adapters


# Few bits, half precision, recomputation, offload: the same training as on one device.


def few_bits(name: str, folder: Path) -> Results:
    make = of(folder / "base", quantization="nf4")
    path = folder / f"{name}-nf4.ckpt"
    resume = {} if name == "single" else {"resumed": path, "moved": folder / "single-nf4.ckpt"}
    done = {
        "nf4, LoRA": fit(name, LoRA(r=4), folder, make=make, max_steps=6),
        "nf4, pruned": fit(
            name, pruned(), folder, make=make, max_steps=6, save_at=SAVED_AFTER, path=path
        ),
    }
    for key, saved in resume.items():
        done[f"nf4, pruned, {key}"] = fit(
            name, pruned(), folder, make=make, max_steps=6, resume=saved
        )
    return done


def half_precision(name: str, folder: Path) -> Results:
    base = Base()
    make = of(folder / "base", dtype="bfloat16")
    done = {"bf16": fit(name, LoRA(r=4), folder, "SGD", make=make, max_steps=6, callbacks=[base])}
    done["bf16"] |= {"dtypes": base.dtypes, "trained": base.trained}
    masks = MASKS if name != "single" else ()
    for recompute in (False, True):
        make = of(folder / "base", gradient_checkpointing=recompute)
        for mask in masks:
            adapter = DropLoRA(r=4, p=0.5, mask=mask, lora_dropout=0.1)
            key = f"{mask}, {'recomputed' if recompute else 'kept'}"
            done[key] = fit(name, adapter, folder, make=make, max_steps=3)
    return done


def offloaded(name: str, folder: Path) -> Results:
    stage = int(name[-1])

    def engine() -> DeepSpeed:
        return DeepSpeed(
            stage=stage,
            offload_optimizer=True,
            offload_parameters=stage == 3,
            logging_level=logging.ERROR,
        )

    path = folder / f"{name}-offload.ckpt"
    make = of(folder / "base")
    return {
        "offload": fit(
            name,
            pruned(),
            folder,
            strategy=engine(),
            make=make,
            max_steps=6,
            save_at=SAVED_AFTER,
            path=path,
        ),
        "offload, resumed": fit(
            name, pruned(), folder, strategy=engine(), make=make, max_steps=6, resume=path
        ),
    }


def train(name: str, rank: int, folder: Path) -> Results:
    done: Results = {}
    if importlib.util.find_spec("bitsandbytes"):
        done |= few_bits(name, folder)
    if name != "ddp":
        done |= half_precision(name, folder)
    if name == "single":
        done["offload"] = fit(name, pruned(), folder, make=of(folder / "base"), max_steps=6)
    if name.startswith("zero"):
        done |= offloaded(name, folder)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> Results:
    return engine_worker.launch(train, "single", folder, world=1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "fsdp",
        pytest.param("ddp", marks=pytest.mark.long),
        pytest.param("zero2", marks=[needs_deepspeed, pytest.mark.long]),
        pytest.param("zero3", marks=needs_deepspeed),
    ],
)
def test_large_bases_train_as_on_one_device(name: str, folder: Path, single: Results) -> None:
    one, other = engine_worker.launch(train, name, folder)
    for key in one:
        assert one[key]["decisions"] == other[key]["decisions"]
        if "step" not in key:  # masks that each process has of its own
            assert_equal(one[key], other[key])
    for key in one:
        if key.startswith("nf4"):
            assert_close(one[key], single[", ".join(key.split(", ")[:2])], 1e-5)
        if key.startswith("offload"):
            assert_close(one[key], single["offload"], 1e-4)
        if key.endswith("resumed"):
            assert_equal(one[key], one[key.removesuffix(", resumed")])
        if key.endswith("recomputed"):
            assert_equal(one[key], one[key.replace("recomputed", "kept")])
    if "bf16" in one:
        assert (one["bf16"]["dtypes"], one["bf16"]["trained"]) == (
            {torch.bfloat16},
            {torch.float32},
        )
        assert_close(one["bf16"], single["bf16"], 1e-2)
    if "nf4, pruned" in one:
        assert {d["step"] for d in one["nf4, pruned"]["decisions"]} == {1, 2, 3}
