"""The speed benchmark runs on a tiny shape; nothing here asserts a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
import page  # noqa: E402

# Without start-up, whose processes take seconds each.
SECTIONS = [
    "steps",
    "lora",
    "loss",
    "packing",
    "importance",
    "pruned",
    "loradrop",
    "inference",
    "life",
    "others",
    "optimizer",
    "growth",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), *SECTIONS, "--tiny"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--folder", str(place), "--page", str(place / "speed.md")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_writes_its_figures_with_the_machine(folder, section) -> None:
    written = json.loads((folder / f"{section}.json").read_text())
    assert written["machine"]["torch"]
    assert written["machine"]["threads"] == 1
    assert written["rows"]
    for row in written["rows"]:
        assert row["got"] == row["got"], row["name"]  # not NaN
        assert row["met"] is None or isinstance(row["met"], bool)


def test_the_page_holds_every_figure_and_keeps_its_text(folder) -> None:
    text = (folder / "speed.md").read_text()
    for section in SECTIONS:
        for row in json.loads((folder / f"{section}.json").read_text())["rows"]:
            assert f"| {row['name']} |" in text
    (folder / "speed.md").write_text(text.replace("# Speed", "# Speed\n\nWords."))
    page.write(folder, folder / "speed.md")
    assert "Words." in (folder / "speed.md").read_text()
    assert (folder / "speed.md").read_text().count("### Training steps\n") == 1
    for name in re.findall(r"\(images/(\w+\.png)\)", text):
        assert (folder / "images" / name).is_file()
    assert {"speed_steps.png", "speed_growth.png", "speed_pruned.png"} <= set(
        re.findall(r"\w+\.png", text)
    )


def test_steps_on_all_cores_are_a_section_of_their_own(folder) -> None:
    cores = os.cpu_count() or 1
    if cores == 1:
        pytest.skip("there is one core")
    one, all_cores = (
        json.loads((folder / name).read_text())
        for name in ("steps.json", f"steps-{cores}-threads.json")
    )
    assert one["machine"]["threads"] == 1
    assert all_cores["machine"]["threads"] == cores
    names = [[row["name"] for row in section["rows"]] for section in (one, all_cores)]
    assert names[0] == names[1]
    assert f"### Training steps, {cores} threads\n" in (folder / "speed.md").read_text()


def test_growth_has_time_and_memory_of_each_size(folder) -> None:
    rows = json.loads((folder / "growth.json").read_text())["rows"]
    assert {row["axis"] for row in rows} == {"r", "layers", "tokens", "vocabulary"}
    for axis in ("layers", "tokens"):
        peaks = [r["peak_bytes"] for r in rows if r["axis"] == axis and r["case"] == "LoRA"]
        assert peaks == sorted(peaks)
        assert peaks[-1] > 1.2 * peaks[0]


def test_a_life_ends_at_the_last_rank(folder) -> None:
    life = json.loads((folder / "pruned.json").read_text())["life"]
    assert len(life["seconds"]) == len(life["before_step"]) == len(life["ranks"])
    assert (life["ranks"][0], life["ranks"][-1]) == (32, 4)
    assert life["ranks"] == sorted(life["ranks"], reverse=True)
    assert len(set(life["ranks"])) == 15


def test_what_is_exact_is_exact_at_any_size(folder) -> None:
    rows = {
        row["name"]: row["got"]
        for name in ("importance", "pruned", "loradrop")
        for row in json.loads((folder / f"{name}.json").read_text())["rows"]
    }
    assert rows["importance against the naive computation, relative"] < 1e-5
    assert rows["PrunedLoRA's parameters, gradients, moments / LoRA's of that rank"] == 1


def test_ratios_are_taken_within_rounds() -> None:
    # The second round is ten times slower for both: nothing of it is left in the ratio.
    seconds = {"a": [2.0, 20.0, 2.2], "b": [1.0, 10.0, 1.1], "floor": [0.5, 9.5, 0.6]}
    assert harness.ratio(seconds, "a", "b")["median"] == pytest.approx(2)
    assert harness.overhead_ratio(seconds, "a", "b", "floor") == pytest.approx(1.6 / 0.5)


def test_a_step_that_others_disturbed_is_measured_again(monkeypatch) -> None:
    used = iter([0.0, 1.0, 1.0, 1.0])  # seconds that others took before and after each try
    calls: list[int] = []
    monkeypatch.setattr(harness, "others", lambda: next(used))
    monkeypatch.setattr(harness.torch, "get_num_threads", lambda: 2)
    harness.timed(lambda: calls.append(1))
    assert len(calls) == 2


def test_every_case_takes_its_turn_in_each_round() -> None:
    calls: list[str] = []
    cases = {name: (lambda n=name: calls.append(n)) for name in "abc"}
    seconds = harness.interleave(cases, rounds=4, warmup=1)
    assert all(len(times) == 4 for times in seconds.values())
    rounds = [calls[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1


def test_the_peak_counts_what_was_alive_at_once() -> None:
    import torch

    def case() -> None:
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        second.add_(torch.ones(1000, 1000))

    assert harness.tensor_peak(case) == pytest.approx(8e6, rel=0.01)
