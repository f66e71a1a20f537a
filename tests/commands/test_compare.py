"""The words of a comparison are its own, or fit's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_peft.commands.compare import read_comparison
from lightning_peft.comparison.plan import make_plan
from lightning_peft.comparison.schema import Match, Rates
from lightning_peft.errors import UserError
from lightning_peft.settings.resolve import Resolver

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
SETTINGS = {
    "folder": "out",
    "runs": {
        "a": {"model.adapter": {"class_path": "PiSSA", "init_args": {"rank_gate": "RankDropout"}}},
        "b": ["b.yaml", {"model.adapter.r": 4}],
    },
    "rates": {"values": [0.1, 0.2], "best": "lowest"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def test_options_of_fit_are_set_apart(file: Path) -> None:
    words = ["--config", str(file), "--trainer.max_steps", "3", "--seeds", "[1, 2]"]
    words += ["--data.data_dir=D", "--plan_only", "true"]
    comparison, folder, extra, options = read_comparison(words)
    assert extra == ["--trainer.max_steps", "3", "--data.data_dir=D"]
    assert folder == file.parent
    assert comparison.seeds == [1, 2]
    assert (options.plan_only, options.table_only, options.retry_failed) == (True, False, False)


def test_runs_stay_as_they_are_written_and_groups_become_objects(file: Path) -> None:
    comparison, *_ = read_comparison(["-c", str(file), "--match.steps", "5"])
    assert comparison.runs == SETTINGS["runs"]
    assert comparison.rates == Rates([0.1, 0.2], best="lowest")
    assert comparison.match == Match(steps=5)


def test_a_wrong_key_is_one_sentence(file: Path) -> None:
    with pytest.raises(ValueError, match="sed is unknown; did you mean seeds?"):
        read_comparison(["--config", str(file), "--sed", "[1]"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("runs: {a: {}}\nruns: {b: {}}", "c.yaml: 'runs' stands in line 2 and again in line 3"),
        ("runs: {a: {}, a: {}}", "c.yaml: 'runs.a' stands in line 2 and again in line 2"),
        ("runs: {1: {}}", "^runs: the name 1 is no text; put it in quotes"),
        ("runs: {a: {null: 3}}", "^runs.a: the name null is no text"),
        ("runs: {a: 5}", "c.yaml: runs.a: 5 is no str or mapping or list of str or mapping"),
        ("runs: {a: null}", "c.yaml: runs.a: null is no str or mapping or list"),
        ("runs: {a: {}}\nseeds: null", "^seeds: null is no list of int"),
        ("runs: {a: {}}\ngrid: {a: {p: 3}}", "c.yaml: grid.a.p: 3 is no list"),
        ("runs: {a: {}}\nrates: 5", "rates: 5 is no mapping of keys to values; its keys are best"),
        ("runs: {a: {}}\nrates: {values: [.nan]}", "^rates.values: nan is no number to work with"),
        ("runs: {a: {}}\nmatch: {seconds: .inf}", "^match.seconds: inf is no number to work with"),
        ("runs: {a: {}}\nmatch: {steps: -1}", "^match.steps: -1 is below zero"),
        ("{", "c.yaml, line 2 is not valid YAML"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"folder: out\n{text}")
    with pytest.raises(UserError, match=sentence) as error:
        read_comparison(["--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named() -> None:
    for words in (["--config", "no.yaml"], ["-c", "no.yaml"], ["--config=no.yaml"]):
        with pytest.raises(UserError, match="the file no.yaml does not exist"):
            read_comparison(words)
    with pytest.raises(UserError, match="--config needs a value"):
        read_comparison(["--config"])
    with pytest.raises(UserError, match="arguments are required: runs, folder"):
        read_comparison([])


def test_what_a_run_names_is_checked_like_that_of_fit(
    file: Path, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    evil = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
    for change in (
        {"runs": {"a": {"model.optimizer": evil}}},
        {"overrides": {"model": {"optimizer": evil}}},
        {"runs": {"a": {}}, "grid": {"a": {"model.optimizer": [evil]}}},
    ):
        settings = {"folder": "out", "base": [QUICKSTART], "runs": {"a": {}}, **change}
        file.write_text(yaml.safe_dump(settings))
        comparison, folder, extra, _ = read_comparison(["--config", str(file)])
        with pytest.raises(UserError, match="^runs.a.*: model.optimizer: 'os.system' is no Optim"):
            make_plan(comparison, folder, extra, resolver)
    assert not Path("ran").exists()


def test_help_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_comparison(["--help"])
    assert "The comparison's file." in capsys.readouterr().out
