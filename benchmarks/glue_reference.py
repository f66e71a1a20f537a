"""RTE and SST-2 on MiniLM by a plain loop of PyTorch and PEFT, to hold our own runs against.

    python benchmarks/glue_reference.py --task rte --data_dir DATA --seeds 0 1 2 3 4

Nothing of lightning_peft is used but the model's folder. Records, tokens, batches, schedule and
optimizer are those of ``configs/families/glue/small.yaml``, written anew. Each seed adds a line to
the file of results.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

from lightning_peft.assets import resolve_model

RESULTS = Path(__file__).parent / "results" / "glue_reference.jsonl"
LABELS = {"entailment": 0, "not_entailment": 1, "0": 0, "1": 1}
FOLDERS = {"rte": "RTE", "sst2": "SST-2"}
Record = tuple[tuple[str, ...], int]  # a sentence or a pair, and its label


def read(path: Path) -> list[Record]:
    """The records of a published file; RTE's rows begin with a number."""
    head, *lines = path.read_text().splitlines()
    first = int(head.startswith("index"))
    rows = [line.split("\t")[first:] for line in lines]
    return [(tuple(row[:-1]), LABELS[row[-1]]) for row in rows]


def train(folder: Path, seed: int, steps: int, rate: float, batch: int) -> dict[str, float]:
    """Train on a folder's train set, and score its dev set."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    name = resolve_model("minilm")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    config = LoraConfig("SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(model, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, math.ceil(0.06 * steps), steps)

    def outputs(records: list[Record]) -> tuple[torch.Tensor, torch.Tensor]:
        texts, labels = zip(*records, strict=True)
        columns = [list(column) for column in zip(*texts, strict=True)]
        options = {"truncation": True, "max_length": 128, "padding": True, "return_tensors": "pt"}
        return model(**tokenizer(*columns, **options)).logits, torch.tensor(labels)

    records, dev = read(folder / "train.tsv"), read(folder / "dev.tsv")
    order: list[Record] = []
    for _ in range(steps):
        if len(order) < batch:
            order = rng.sample(records, len(records))
        drawn, order = order[:batch], order[batch:]
        cross_entropy(*outputs(drawn)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        parts = [outputs(dev[i : i + 64]) for i in range(0, len(dev), 64)]
    logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return {
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "loss": cross_entropy(logits, labels).item(),
    }


def main() -> None:
    """Train each seed that is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=FOLDERS, default="rte")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    for seed in given.seeds:
        folder = given.data_dir / FOLDERS[given.task]
        scores = train(folder, seed, given.steps, given.rate, given.batch)
        settings = {name: getattr(given, name) for name in ("task", "steps", "rate", "batch")}
        line = json.dumps({**settings, "seed": seed, **scores})
        print(line, flush=True)
        with given.output.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
