"""Pictures of a comparison are drawn of what its runs left."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.pictures import save_pictures
from lightning_peft.comparison.plan import Plan


def test_pictures_are_drawn_of_what_is_there(plan: Plan, tmp_path: Path) -> None:
    names = [path.name for path in save_pictures(Outcomes(plan), tmp_path)]
    assert names == ["score_by_parameters.png", "score_by_seed.png", "curves.png"]


def test_a_picture_of_which_nothing_is_left_goes(plan: Plan, tmp_path: Path) -> None:
    plan.comparison.curve = "no_such_metric"
    old = tmp_path / "curves.png"
    old.write_bytes(b"of an earlier comparison")
    names = [path.name for path in save_pictures(Outcomes(plan), tmp_path)]
    assert names == ["score_by_parameters.png", "score_by_seed.png"]
    assert not old.exists()
