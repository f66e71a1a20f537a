"""A damaged checkpoint is refused in one sentence, or is what it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import Bed, Mutant, names_its_place  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(base, tmp_path_factory.mktemp("bed"))


def test_a_good_checkpoint_is_fine(bed: Bed) -> None:
    assert bed.judge(Mutant("nothing", bed.good, rewritten=False)) == "fine"


def check(bed: Bed, count: int) -> None:
    said = [(mutant.what, bed.judge(mutant)) for mutant in bed.mutants(0, count)]
    assert [pair for pair in said if not pair[1].startswith(("fine", "sentence"))] == []
    refused = [text for _, text in said if text != "fine"]
    assert [text for text in refused if not names_its_place(text)] == []
    assert len(refused) > 0.8 * count


def test_damaged_checkpoints_are_refused_or_what_they_were(bed: Bed) -> None:
    check(bed, 60)


@pytest.mark.long
def test_four_hundred_damaged_checkpoints_are_refused_or_what_they_were(bed: Bed) -> None:
    check(bed, 400)


def test_mutants_are_the_same_for_a_seed(bed: Bed) -> None:
    first, second = ([m.what for m in bed.mutants(3, 20)] for _ in range(2))
    assert first == second
