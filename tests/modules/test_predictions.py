"""Predictions on the disk: their order, what an interruption leaves, several processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing import start_processes

from lightning_peft.datamodules import Protocol
from lightning_peft.modules.predictions import PredictionWriter


class Shouting:
    """What a writer needs of a data module; an answer is right in capitals."""

    def __init__(self, tasks: Sequence[str] = ("c",), **counts: int) -> None:
        self.protocol = Protocol("ours", "{instruction}?", "response", 64, 8, stop=("ü",))
        self.test_tasks = list(tasks)
        self.counts, self.fingerprint = counts, "6 records"
        self.temperatures: dict[str, float] = {}
        self.judged: list[int] = []
        self.answers: list[Any] = []

    def test_stamp(self, task: str) -> dict[str, Any]:
        own = replace(self.protocol, temperature=self.temperatures.get(task, 0.0))
        known = {"records": self.counts.get(task, 6), "fingerprint": self.fingerprint}
        return {**asdict(own), **known}

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self.judged.append(row["index"])
            row["correct"] = row["output"] == row["expected"]

    def score(self, task: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {"share": sum(row["correct"] for row in rows) / len(rows), "rows": float(len(rows))}

    def write_answers(self, folder: Path, predictions: Mapping[str, Sequence[Any]]) -> None:
        self.answers.append((folder, dict(predictions)))


def batch_of(*indices: int, task: str = "c") -> dict[str, Any]:
    return {
        "input_ids": torch.tensor([[i, i + 100] for i in indices]),
        "attention_mask": torch.ones(len(indices), 2),
        "index": list(indices),
        "prompt": [f"{i}?" for i in indices],
        "expected": [f"Ä {i}" for i in indices],
        "task": task,
    }


def answers(*indices: int) -> list[str]:
    """Those to even numbers are right."""
    return [f"{'äÄ'[i % 2 == 0]} {i}" for i in indices]


def row(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": f"{index}?",
        "output": answers(index)[0],
        "expected": f"Ä {index}",
        "correct": index % 2 == 0,
    }


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def interrupted(
    folder: Path, data: Shouting, weights: str, *batches: Sequence[int], rank: int = 0
) -> None:
    """A test that ends after some batches, without its last word."""
    writer = PredictionWriter(folder, data, weights, rank)
    for indices in batches:
        writer.write(batch_of(*indices), [answers(*indices)])


def test_rows_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    data = Shouting(["c", "d"])
    writer = PredictionWriter(tmp_path / "p", data, "w")
    writer.write(batch_of(4, 1), [answers(4, 1)])
    writer.write(batch_of(0, task="d"), [answers(0)])
    writer.write(batch_of(5, 0, 3), [answers(5, 0, 3)])
    writer.write(batch_of(2), [answers(2)])
    scores = writer.finish()
    assert lines(tmp_path / "p" / "c.jsonl") == [row(i) for i in range(6)]
    assert lines(tmp_path / "p" / "d.jsonl") == [row(0)]
    assert scores == {"c": {"share": 0.5, "rows": 6.0}, "d": {"share": 1.0, "rows": 1.0}}
    assert data.answers == [(tmp_path / "p", {"c": [row(i) for i in range(6)], "d": [row(0)]})]


def test_only_final_files_are_left_and_the_protocol_beside_them(tmp_path: Path) -> None:
    data = Shouting(["c", "c.d"])
    writer = PredictionWriter(tmp_path, data, "w")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"c.part0", "c.d.part0", "protocol.json"}
    writer.write(batch_of(0), [answers(0)])
    writer.finish()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"c.jsonl", "c.d.jsonl", "protocol.json"}
    stamp = json.loads((tmp_path / "protocol.json").read_text(encoding="utf-8"))
    assert (stamp["name"], stamp["max_new_tokens"], stamp["stop"]) == ("ours", 8, ["ü"])


def test_every_line_is_written_at_once(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, Shouting(), "w")
    writer.write(batch_of(3, 1), [answers(3, 1)])
    assert lines(tmp_path / "c.part0")[1:] == [row(3), row(1)]
    assert writer.finish()["c"]["rows"] == 2


def test_predictions_need_no_scores(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, Shouting(), "w")
    writer.write(batch_of(1, 0), [answers(1, 0)])
    assert writer.finish(score=False) == {}
    assert lines(tmp_path / "c.jsonl") == [row(0), row(1)]


def test_a_task_without_rows_has_no_score(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, Shouting(["c", "d"]), "w")
    writer.write(batch_of(0), [answers(0)])
    assert writer.finish() == {"c": {"share": 1.0, "rows": 1.0}}
    assert lines(tmp_path / "d.jsonl") == []


def test_the_turns_of_a_conversation_become_a_list(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, Shouting(), "w")
    writer.write(batch_of(1, 0), [["one", "zero"], ["one again", "zero again"]])
    writer.finish()
    outputs = [line["output"] for line in lines(tmp_path / "c.jsonl")]
    assert outputs == [["zero", "zero again"], ["one", "one again"]]


def test_an_interrupted_test_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    interrupted(tmp_path, Shouting(), "w", [5, 0], [3, 1])
    part = tmp_path / "c.part0"
    written = part.read_bytes()
    part.write_bytes(written[:-20])

    data = Shouting()
    writer = PredictionWriter(tmp_path, data, "w")
    assert sorted(writer.rows["c"]) == [0, 3, 5]
    # What was cut off is gone, so that the next line begins where a line should.
    assert part.read_bytes() == b"".join(written.splitlines(keepends=True)[:-1])
    assert writer.unanswered(batch_of(5, 0)) is None
    left = writer.unanswered(batch_of(3, 1))
    assert left is not None
    writer.write(left, [answers(1)])
    writer.write(batch_of(4, 2), [answers(4, 2)])
    assert writer.finish()["c"] == {"share": 0.5, "rows": 6.0}
    assert data.judged == [1, 4, 2]
    assert lines(tmp_path / "c.jsonl") == [row(i) for i in range(6)]
    assert not part.exists()


def test_a_line_may_be_cut_anywhere(tmp_path: Path) -> None:
    """Within a character of several bytes too."""
    interrupted(tmp_path, Shouting(), "w", [0, 1])
    written = (tmp_path / "c.part0").read_bytes()
    last = written.splitlines(keepends=True)[-1]
    assert len(last) > len(last.decode())
    for cut in range(1, len(last) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "c.part0").write_bytes(written[:-cut])
        writer = PredictionWriter(folder, Shouting(), "w")
        assert writer.rows["c"] == ({0: row(0), 1: row(1)} if cut == 1 else {0: row(0)})


def test_an_interruption_may_come_before_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "c.part0").write_bytes(b"")
    assert PredictionWriter(tmp_path, Shouting(), "w").rows["c"] == {}
    stamp = (tmp_path / "c.part0").read_bytes()
    (tmp_path / "c.part0").write_bytes(stamp[:30])
    assert PredictionWriter(tmp_path, Shouting(), "w").rows["c"] == {}
    assert (tmp_path / "c.part0").read_bytes() == stamp


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "a\u20285\u2028b", "a\x855\x85b", "a\x0b\x0c\x1c5"]
)
def test_answers_may_hold_any_line_break(text: str, tmp_path: Path) -> None:
    PredictionWriter(tmp_path, Shouting(), "w").write(batch_of(0, 1), [[text, "b"]])
    writer = PredictionWriter(tmp_path, Shouting(), "w")
    assert [writer.rows["c"][i]["output"] for i in (0, 1)] == [text, "b"]


def test_a_test_may_be_interrupted_again(tmp_path: Path) -> None:
    for indices in ([5, 0], [3, 1], [4, 2]):
        interrupted(tmp_path, Shouting(), "w", indices)
    writer = PredictionWriter(tmp_path, Shouting(), "w")
    assert writer.unanswered(batch_of(*range(6))) is None
    assert writer.finish()["c"]["rows"] == 6


def test_unanswered_filters_tensors_and_lists(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, Shouting(["c", "d"]), "w")
    writer.write(batch_of(1, 4), [answers(1, 4)])
    left = writer.unanswered(batch_of(0, 1, 2, 4))
    assert left is not None
    assert left["input_ids"].tolist() == [[0, 100], [2, 102]]
    assert left["attention_mask"].shape == (2, 2)
    assert (left["index"], left["prompt"]) == ([0, 2], ["0?", "2?"])
    assert (left["expected"], left["task"]) == (["Ä 0", "Ä 2"], "c")
    assert writer.unanswered(batch_of(1, 4)) is None
    whole = batch_of(1, 4, task="d")
    assert writer.unanswered(whole) is whole


def test_each_tasks_own_protocol_and_records_are_stamped(tmp_path: Path) -> None:
    data = Shouting(["math", "writing"], math=3)
    data.temperatures = {"writing": 0.7}
    PredictionWriter(tmp_path, data, "w")
    stamp = json.loads((tmp_path / "protocol.json").read_text(encoding="utf-8"))
    assert stamp["temperature"] == 0.0
    assert stamp["tasks"] == {
        "math": {"records": 3, "fingerprint": "6 records"},
        "writing": {"temperature": 0.7, "records": 6, "fingerprint": "6 records"},
    }


def test_stamps_of_an_earlier_test_stay_with_its_files(tmp_path: Path) -> None:
    first = Shouting(["c", "gone"], c=1)
    writer = PredictionWriter(tmp_path, first, "w")
    writer.write(batch_of(0), [answers(0)])
    writer.finish()
    (tmp_path / "gone.jsonl").unlink()
    second = Shouting(["d"])
    second.protocol = replace(first.protocol, name="other", max_new_tokens=9)
    PredictionWriter(tmp_path, second, "w").finish()
    stamp = json.loads((tmp_path / "protocol.json").read_text(encoding="utf-8"))
    assert (stamp["name"], stamp["max_new_tokens"]) == ("other", 9)
    known = {"fingerprint": "6 records"}
    assert stamp["tasks"] == {
        "c": {"name": "ours", "max_new_tokens": 8, "records": 1, **known},
        "d": {"records": 6, **known},
    }


@pytest.mark.parametrize(
    "changed", ["weights", "protocol", "the task's protocol", "counts", "records"]
)
def test_another_test_starts_anew(changed: str, tmp_path: Path) -> None:
    interrupted(tmp_path, Shouting(), "w", [0, 1])
    data = Shouting(c=7) if changed == "counts" else Shouting()
    if changed == "protocol":
        data.protocol = Protocol("ours", "{instruction}?", "response", 64, 9, stop=("ü",))
    if changed == "the task's protocol":
        data.temperatures = {"c": 0.7}
    if changed == "records":
        data.fingerprint = "6 others"
    writer = PredictionWriter(tmp_path, data, "v" if changed == "weights" else "w")
    assert writer.rows["c"] == {}
    assert len(lines(tmp_path / "c.part0")) == 1


@pytest.mark.parametrize("place", ["last.ckpt", "adapter/adapter_model.safetensors"])
def test_other_weights_of_the_same_name_start_anew(place: str, tmp_path: Path) -> None:
    file = tmp_path / "run" / place
    file.parent.mkdir(parents=True)
    file.write_text("weights")
    weights = str(file if file.suffix == ".ckpt" else file.parent)
    interrupted(tmp_path / "p", Shouting(), weights, [0, 1])
    assert len(PredictionWriter(tmp_path / "p", Shouting(), weights).rows["c"]) == 2
    os.utime(file, (1e9, 2e9))
    assert PredictionWriter(tmp_path / "p", Shouting(), weights).rows["c"] == {}


def test_a_finished_test_is_done_again(tmp_path: Path) -> None:
    for _ in range(2):
        writer = PredictionWriter(tmp_path, Shouting(), "w")
        assert writer.unanswered(batch_of(0, 1)) is not None
        writer.write(batch_of(0, 1), [answers(0, 1)])
        writer.finish()
    assert lines(tmp_path / "c.jsonl") == [row(0), row(1)]


def test_a_finished_file_stays_until_the_next_is_there(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, Shouting(), "w")
    writer.write(batch_of(0), [answers(0)])
    writer.finish()
    interrupted(tmp_path, Shouting(), "v", [1])
    assert lines(tmp_path / "c.jsonl") == [row(0)]


def share_of_two(rank: int, folder: Path) -> None:
    """Answer every second row, as a loader shares them out, with an interruption in between.

    Both processes have row 0, as where rows do not divide evenly.
    """
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mine = ([[0, 5], [2]], [[1, 3], [4, 0]])[rank]
    interrupted(folder / "p", Shouting(), "w", mine[0], rank=rank)
    distributed.barrier()
    data = Shouting()
    writer = PredictionWriter(folder / "p", data, "w", rank)
    for indices in mine:
        asked = writer.unanswered(batch_of(*indices))
        if asked is not None:
            writer.write(asked, [answers(*asked["index"])])
    result = {"scores": writer.finish(), "judged": data.judged, "wrote": len(data.answers)}
    (folder / f"result{rank}.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks, which saves importing everything anew")
def test_two_processes_write_one_file_and_get_equal_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    start_processes(share_of_two, (tmp_path,), nprocs=2, start_method="fork")
    results = [json.loads((tmp_path / f"result{rank}.json").read_text()) for rank in range(2)]
    assert [(result["judged"], result["wrote"]) for result in results] == [([2], 1), ([4, 0], 0)]
    assert results[0]["scores"] == results[1]["scores"] == {"c": {"share": 0.5, "rows": 6.0}}
    assert lines(tmp_path / "p" / "c.jsonl") == [row(i) for i in range(6)]
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"c.jsonl", "protocol.json"}
