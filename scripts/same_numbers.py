"""Records fixed-seed runs of a checkout, and compares two records: a refactoring keeps numbers.

    python scripts/same_numbers.py record --checkout DIR --output FILE.json [--case NAME ...]
    python scripts/same_numbers.py compare OLD.json NEW.json [--case NAME ...]

A case is one or two commands (``fit``, then perhaps the rest of it, or ``test``) of 15 to 60 steps.
Its record holds the hashes of what the run left, and its ranks, parameters and last metrics. Every
option stands here, so that a checkout's configuration files do not matter. One thread, one case
after the other; numbers are equal on one machine with the same packages, not between machines.
A run is a fork of this process, which has imported the packages below the checkout, and then does
what ``python -m lightning_peft`` does; where there are two processes it is that command itself.

Left out, since they cannot repeat: columns and metrics of times and memory
(``tokens_per_second``), and the checkout's own path, which ``adapter_config.json`` holds.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Options = dict[str, Any]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside the clone, as for tests

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "DS_ACCELERATOR": "cpu",
    "LIGHTNING_PEFT_TRACEBACK": "1",
}
# Imported once, since they take two thirds of a short run; the checkout is imported by each run.
PACKAGES = ("torch", "transformers", "torchmetrics", "datasets", "lightning.pytorch.cli")
FILES = (
    "metrics.csv",
    "importance.csv",
    "decisions.csv",
    "layout.json",
    "adapter/*",
    "model/*.safetensors",
    "predictions/*.jsonl",
)
UNREPEATABLE = re.compile("second|time|memory")

RUN: Options = {
    "seed_everything": 0,
    "trainer.accelerator": "cpu",
    "trainer.default_root_dir": "runs",
    "trainer.log_every_n_steps": 5,
    "trainer.gradient_clip_val": 1.0,
    "trainer.max_steps": 30,
    "trainer.check_val_every_n_epoch": "null",
    "importance.every_n_steps": 10,
    "model.model_name_or_path": "tiny_llama",
    "model.optimizer": "torch.optim.AdamW",
    "model.optimizer.lr": 2e-3,
    "model.optimizer.weight_decay": 0.0,
    "model.lr_scheduler_type": "linear",
    "model.warmup_steps": 5,
}
ARITHMETIC: Options = {
    "data": "ArithmeticDataModule",
    "data.task": "subtraction",
    "data.regime": "stream",
    "data.batch_size": 16,
    "data.eval_batch_size": 100,
    "data.val_size": 100,
    "trainer.val_check_interval": 15,
}
# The quickstart, and the small rows of the papers on real records.
QUICKSTART: Options = {
    "data": "ArithmeticDataModule",
    "data.batch_size": 128,
    "data.eval_batch_size": 500,
    "trainer.max_steps": 60,
    "trainer.val_check_interval": 30,
    "trainer.log_every_n_steps": 10,
    "model.optimizer.lr": 3e-3,
    "model.warmup_steps": 20,
    "validate_first": "true",
}
RECORDS: Options = {"trainer.max_steps": 20, "trainer.val_check_interval": 10}
COMMONSENSE: Options = {
    **RECORDS,
    "data": "CommonsenseDataModule",
    "data.data_dir": "DATA/commonsense",
    "data.protocol": "droplora",
    "data.batch_size": 4,
    "data.eval_batch_size": 16,
    "data.max_length": 1024,
    "data.val_size": 16,
    "model.optimizer.lr": 1e-3,
}
E2E: Options = {
    **RECORDS,
    "data": "E2EDataModule",
    "data.data_dir": "DATA/nlg/e2e",
    "data.train_split": "dev",
    "data.batch_size": 8,
    "data.eval_batch_size": 8,
    "data.max_length": 512,
    "data.max_new_tokens": 32,
    "data.val_size": 8,
    "data.test_limit": 8,
}
DART: Options = {
    **E2E,
    "data": "DartDataModule",
    "data.data_dir": "DATA/nlg/dart",
    "data.test_split": "dev",
    "data.max_length": 768,
}
GLUE: Options = {
    **RECORDS,
    "model": "SequenceClassificationModule",
    "data": "GlueDataModule",
    "data.data_dir": "DATA/glue",
    "data.task": "cola",
    "data.max_length": 256,
    "data.batch_size": 16,
    "data.eval_batch_size": 64,
    "data.val_limit": 100,
}
ROW: Options = {"r": 32, "target_modules": '["q_proj","k_proj","v_proj","up_proj","down_proj"]'}
TOKEN: Options = {"r": 32, "p": 0.1, "mask": "token"}
PRUNED: Options = {"r": 16, "target_r": 4, "start_step": 6, "prune_every": 4, "prune_count": 4}
PROBE: Options = {"r": 16, "threshold": 0.9, "sample_ratio": 0.1, "probe_epochs": 1}
DROPOUT: Options = {"r": 8, "lora_dropout": 0.1}
TWO: Options = {"trainer.devices": 2, "data.batch_size": 8}
ZERO: Options = {"trainer.strategy": "lightning_peft.engines.DeepSpeed"}
ZERO2: Options = {**ZERO, "trainer.strategy.stage": 2}


def words(command: str, adapter: str, arguments: Options, options: Options) -> list[str]:
    """The command line of a run.

    Args:
        command: ``fit`` or ``test``.
        adapter: The strategy's name.
        arguments: The strategy's arguments.
        options: What is laid over ``RUN``; a class comes before its arguments.

    Returns:
        The words after the program's name.
    """
    found = {"model": "CausalLMModule", **RUN, **options}
    found["model"] = f"lightning_peft.{found['model']}"
    found["data"] = f"lightning_peft.datamodules.{found['data']}"
    found["model.adapter"] = f"lightning_peft.strategies.{adapter}"
    found |= {f"model.adapter.{key}": str(value) for key, value in arguments.items()}
    return [command, *(f"--{key}={value}" for key, value in found.items())]


# The longer run has other settings; checkouts that do not compare them do not know the word.
LONGER = "--resume_with_changes=true"


def case(adapter: str, arguments: Options, *options: Options) -> list[list[str]]:
    """A single fit, on arithmetic where no option names other data."""
    laid = {key: value for each in options for key, value in each.items()}
    base = {} if "data" in laid else ARITHMETIC
    return [words("fit", adapter, arguments, {**base, **laid})]


def resumed(adapter: str, arguments: Options) -> list[list[str]]:
    """A fit of 15 steps, and the fit that goes on from there to 30."""
    (whole,) = case(adapter, arguments, {"checkpoint.every_n_train_steps": 15})
    return [[*whole, "--trainer.max_steps=15"], [*whole, "--ckpt_path=last", LONGER]]


def tested(adapter: str, arguments: Options, options: Options) -> list[list[str]]:
    """A fit, and a test of its last checkpoint."""
    (fit,) = case(adapter, arguments, {"checkpoint.every_n_train_steps": 20}, options)
    fit_only = ("--validate_first", "--checkpoint", "--importance")
    kept = [word for word in fit[1:] if not word.startswith(fit_only)]
    return [fit, ["test", *kept, "--ckpt_path=last"]]


CASES: dict[str, list[list[str]]] = {
    "quickstart": case("DropLoRA", TOKEN, QUICKSTART),
    "lora": case("LoRA", {"r": 8}),
    "rslora": case("LoRA", {"r": 8, "use_rslora": "true"}),
    "droplora_token": case("DropLoRA", {**ROW, **TOKEN}, COMMONSENSE),
    "droplora_step": case("DropLoRA", {**TOKEN, "mask": "step"}),
    "droplora_learned": case("DropLoRA", {**TOKEN, "mask": "learned"}),
    "prunedlora": case("PrunedLoRA", PRUNED),
    "prunedlora_row": case(
        "PrunedLoRA",
        {**ROW, "target_r": 8, "start_step": 4, "prune_every": 2, "prune_count": 4},
        COMMONSENSE,
    ),
    "prunedlora_global": case(
        "PrunedLoRA",
        {**PRUNED, "criterion": "wanda", "recovery": "activation", "allocation": "global"},
    ),
    "loradrop": case("LoRADrop", {**PROBE, "max_probe_steps": 8}),
    "dora": case("DoRA", {"r": 8}),
    "pissa": case("PiSSA", {"r": 8}),
    "milora": case("MiLoRA", {"r": 8}),
    "vera": case("VeRA", {"r": 64}, {"model.optimizer.lr": 2e-2}),
    "tiedlora": case("TiedLoRA", {"r": 8}),
    "sparseadapter": case("SparseAdapter", {"r": 8, "sparsity": 0.5, "start_step": 10}),
    "adalora": case("AdaLoRA", {"r": 12, "target_r": 8, "tinit": 5, "tfinal": 10, "deltaT": 3}),
    "galore": case("GaLore", {"r": 32, "update_proj_gap": 10}),
    "full": case("FullFineTuning", {}, {"model.optimizer.lr": 5e-4}),
    "packing": case("LoRA", ROW, COMMONSENSE, {"data.packing": "true", "trainer.max_steps": 15}),
    "share_dropout": case("LoRA", {**DROPOUT, "share_dropout": "true"}),
    "checkpointing": case("LoRA", DROPOUT, {"model.gradient_checkpointing": "true"}),
    "nf4": case("LoRA", {"r": 8}, {"model.quantization": "nf4"}),
    "bfloat16": case("LoRA", {"r": 8}, {"model.dtype": "bfloat16"}),
    "accumulation": case("LoRA", {"r": 8}, {"trainer.accumulate_grad_batches": 3}),
    "glue": case(
        "LoRADrop",
        {**PROBE, "max_probe_steps": 10, "target_modules": '["q_proj","v_proj"]'},
        GLUE,
    ),
    "e2e_tested": tested("DropLoRA", {**ROW, **TOKEN}, E2E),
    "dart": case("LoRA", ROW, DART),
    "ddp": case("DropLoRA", {**TOKEN, "r": 8}, TWO, {"trainer.strategy": "ddp"}),
    "zero2": case("PrunedLoRA", PRUNED, TWO, ZERO2),
    "resumed": resumed("PrunedLoRA", PRUNED),
}


def record(checkout: Path, output: Path, names: list[str], data: Path) -> bool:
    """Run cases, and write their record after each.

    Args:
        checkout: The root of the code to run.
        output: The file to write.
        names: The cases to run.
        data: The folder of the real records.

    Returns:
        Whether every command ended well.
    """
    os.environ.update(ENVIRONMENT, PYTHONPATH=str(checkout))
    sys.path.insert(0, str(checkout))
    for package in PACKAGES:
        importlib.import_module(package)
    cases: dict[str, Any] = {}
    for name in names:
        before = processor_seconds()
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            knows = (checkout / "lightning_peft" / "settings" / "resume.py").is_file()
            commands = [
                [word.replace("DATA", str(data)) for word in line if knows or word != LONGER]
                for line in CASES[name]
            ]
            error = next((e for line in commands if (e := run(line, Path(folder), checkout))), "")
            cases[name] = {"error": error} if error else left_by(Path(folder), checkout)
        cases[name]["seconds"] = round(processor_seconds() - before, 1)
        print(f"{name}: {cases[name]['seconds']} s", error, flush=True)
        output.write_text(json.dumps({"checkout": str(checkout), "cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} cases, {processor_seconds():.0f} processor seconds, written to {output}")
    return not any("error" in each for each in cases.values())


def run(line: list[str], folder: Path, checkout: Path) -> str:
    """Run ``python -m lightning_peft LINE`` in a folder, and return what it said if it failed."""
    log = folder / "log.txt"
    if "--trainer.devices=2" in line:  # Lightning starts the second process by this command
        with log.open("w") as said:
            command = [sys.executable, "-m", "lightning_peft", *line]
            status = subprocess.run(command, cwd=folder, stdout=said, stderr=said).returncode
    else:
        process = multiprocessing.get_context("fork").Process(
            target=_run_here, args=(line, folder, log, checkout)
        )
        process.start()
        process.join()
        status = int(process.exitcode or 0)
    return "" if status == 0 else f"status {status}: {log.read_text()[-2000:]}"


def _run_here(line: list[str], folder: Path, log: Path, checkout: Path) -> None:
    os.chdir(folder)
    with log.open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv = ["lightning_peft", *line]
    import lightning_peft

    assert checkout in Path(lightning_peft.__file__).parents, lightning_peft.__file__
    runpy.run_module("lightning_peft", run_name="__main__", alter_sys=True)


def processor_seconds() -> float:
    """Of all runs until now: others' load on the machine does not count."""
    times = os.times()
    return times.children_user + times.children_system


def left_by(folder: Path, checkout: Path) -> dict[str, Any]:
    """What a case is compared by: hashes of its files, and the numbers of its ``run.json``."""
    (version,) = (folder / "runs").glob("version_*")
    paths = sorted(path for pattern in FILES for path in version.glob(pattern))
    said = json.loads((version / "run.json").read_text())
    kept = ("strategy", "engine", "processes", "steps", "parameters", "ranks", "status")
    metrics = {k: v for k, v in said["metrics"].items() if not UNREPEATABLE.search(k)}
    return {
        "files": {str(path.relative_to(version)): digest(path, checkout) for path in paths},
        "run": {**{key: said[key] for key in kept}, "metrics": metrics},
    }


def digest(path: Path, checkout: Path) -> str:
    """The sha256 of a file, without what cannot repeat."""
    content = path.read_bytes()
    if path.name == "metrics.csv":
        rows = list(csv.reader(io.StringIO(content.decode())))
        kept = [i for i, column in enumerate(rows[0]) if not UNREPEATABLE.search(column)]
        content = "\n".join(",".join(row[i] for i in kept) for row in rows).encode()
    elif path.name == "adapter_config.json":
        content = content.replace(str(checkout).encode(), b"CHECKOUT")
    return hashlib.sha256(content).hexdigest()


def compare(old: dict[str, Any], new: dict[str, Any], names: list[str]) -> bool:
    """Print a table of two records' cases, and return whether they are equal.

    Args:
        old: The cases of the first record.
        new: The cases of the second.
        names: The cases to compare.

    Returns:
        Whether both records hold all of them, none failed and none differs.
    """
    rows = [(name, *_judge(old.get(name), new.get(name))) for name in names]
    print(f"{'case':20}{'files':>6}  {'':9}{'train_loss':>12}  what differs")
    for name, files, word, loss, what in rows:
        print(f"{name:20}{files:6}  {word:9}{loss:>12}  {what}")
    differing = sum(word != "equal" for _, _, word, _, _ in rows)
    print(f"{len(rows)} cases, {differing} not equal")
    return not differing


def _judge(old: dict[str, Any] | None, new: dict[str, Any] | None) -> tuple[int, str, str, str]:
    """The number of files, one word, the last loss, and what differs."""
    if old is None or new is None:
        return 0, "missing", "", "in the old record" if old is None else "in the new record"
    if "error" in old or "error" in new:
        return 0, "failed", "", (new.get("error") or old["error"]).splitlines()[-1]
    what = [
        key if part == "files" else f"{key}: {old[part].get(key)} -> {new[part].get(key)}"
        for part in ("files", "run")
        for key in {**old[part], **new[part]}
        if old[part].get(key) != new[part].get(key)
    ]
    loss = f"{new['run']['metrics']['train_loss']:.6f}"
    return len(new["files"]), "differs" if what else "equal", loss, "; ".join(what)[:500]


def main() -> None:
    """Read the command line; the exit status is 1 where a case failed or differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run cases on a checkout")
    recording.add_argument("--checkout", type=Path, required=True)
    recording.add_argument("--output", type=Path, required=True)
    recording.add_argument("--data", type=Path, default=DATA)
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    for each in (recording, comparing):
        each.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    given = parser.parse_args()
    if given.command == "record":
        given.output.parent.mkdir(parents=True, exist_ok=True)
        checkout, data = given.checkout.resolve(), given.data.resolve()
        sys.exit(not record(checkout, given.output, given.case, data))
    old, new = (json.loads(path.read_text())["cases"] for path in (given.old, given.new))
    sys.exit(not compare(old, new, given.case))


if __name__ == "__main__":
    main()
