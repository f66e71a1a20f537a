"""Bases that are large for one device: read by shares, in few bits, in half precision, offloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch
from engine_worker import fit
from lightning.pytorch import Callback

from lightning_peft import distributed
from lightning_peft.modules import CausalLMModule, causal_lm
from lightning_peft.modules.sharded_loading import stored_parameters
from lightning_peft.strategies import DropLoRA, LoRA, PiSSA, PrunedLoRA
from lightning_peft.testing import random_batch, tiny_llama

Results = dict[str, Any]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
CUT = ["fsdp", pytest.param("zero3", marks=needs_deepspeed)]


# The base is read by shares.


class Whole(CausalLMModule):
    """Has each process load the base whole, as any module with a loader of its own does."""

    def load_base(self) -> Any:
        return super().load_base()


class Logits(Callback):
    """What the model says before training."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            module.eval()
            self.found = module.model(**inputs(random_batch(7))).logits.clone()
            module.train()


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def of(folder: Path, kind: Any = CausalLMModule, **arguments: Any) -> Callable[..., Any]:
    """Makes a module over a base in a folder, in the place of the embedded one."""
    return lambda _, **given: kind(str(folder), **given, **arguments)


BASES = {"tied": {}, "in parts": {"max_shard_size": "20KB"}, "converted": {}}
ARGUMENTS = {"tied": {}, "in parts": {}, "converted": {"dtype": "bfloat16"}}


def save_bases(folder: Path) -> None:
    for name, saving in BASES.items():
        model = tiny_llama(tie_word_embeddings=name == "tied")
        model.save_pretrained(folder / name, **saving)
    assert (folder / "in parts" / "model.safetensors.index.json").is_file()


def read_by_shares(name: str, rank: int, folder: Path) -> Results:
    loads: list[str] = []
    load, causal_lm.load_causal_lm = (
        causal_lm.load_causal_lm,
        lambda *args, **more: (
            loads.append("whole"),
            load(*args, **more),
        )[1],
    )
    done: Results = {}
    for base in BASES:
        for kind in (Whole, CausalLMModule):
            key = f"{base}, {kind.__name__}"
            say = Logits()
            saved = folder / f"{name}-{key}.ckpt"
            done[key] = fit(
                name,
                DropLoRA(r=4, p=0.5) if base == "tied" else LoRA(r=4),
                folder,
                callbacks=[say],
                make=of(folder / base, kind, **ARGUMENTS[base]),
                max_steps=3,
                save_at=2,
                path=saved,
            )
            done[key] |= {"logits": say.found, "loads": loads[:]}
            loads.clear()
    resumed = folder / f"{name}-tied, Whole.ckpt"
    done["resumed"] = fit(
        name, DropLoRA(r=4, p=0.5), folder, make=of(folder / "tied"), resume=resumed, max_steps=3
    )
    done["resumed"]["loads"] = loads[:]
    fit(name, PiSSA(r=4), folder, make=of(folder / "tied"), max_steps=1)
    done["PiSSA"] = {"loads": loads[:]}
    return done


def assert_equal(one: Results, other: Results) -> None:
    assert one["losses"] == other["losses"]
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), name


@pytest.mark.parametrize("name", CUT)
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


def held_bytes(name: str, rank: int, folder: Path) -> Results:
    made: list[Any] = []

    def make(_: str, **given: Any) -> Any:
        made.append(Measured(str(folder / "large"), **given))
        return made[-1]

    watch = Own()
    fit(name, LoRA(r=2), folder, make=make, max_steps=1, callbacks=[watch])
    return {"peak": made[0].peak, "held": watch.held}


class Own(Callback):
    """Bytes of the base on this process."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        shares = [p for p in module.parameters() if not p.requires_grad]
        pieces = [p.to_local() if hasattr(p, "to_local") else p for p in shares]
        self.held = sum(p.numel() * p.element_size() for p in pieces)


@pytest.mark.parametrize("name", CUT)
def test_no_process_ever_holds_more_than_its_share_and_one_tensor(
    name: str, tmp_path: Path
) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    model = tiny_llama(**shape)
    model.save_pretrained(tmp_path / "large")
    base = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    del model
    assert base > 180e6
    for found in engine_worker.launch(held_bytes, name, tmp_path):
        assert found["held"] == pytest.approx(base / 2, rel=0.01)
        assert found["peak"] < base / 2 + largest + 4e6  # adapters
