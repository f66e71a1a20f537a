"""What the jobs left says which rate is chosen, what is due and what failed."""

from __future__ import annotations

from lightning_peft.comparison.outcomes import Outcomes, read_outcome
from lightning_peft.comparison.plan import Job, Plan
from lightning_peft.comparison.schema import Match, Rates
from lightning_peft.comparison.worker import write_result


def test_the_rate_is_chosen_on_validation(plan: Plan) -> None:
    outcomes = Outcomes(plan)
    assert outcomes.rates_of("base") == {0.1: 2.0, 0.01: 1.0}
    assert outcomes.choice("base") == (True, 0.01)
    plan.comparison.rates = Rates([0.1, 0.01], choose_by="val_loss", best="highest")
    assert Outcomes(plan).choice("base") == (True, 0.1)


def test_a_rate_that_failed_is_not_chosen_and_one_that_is_due_is_awaited(plan: Plan) -> None:
    folder = plan.folder_of(Job("base", 0.01, 0))
    write_result(folder, "failed", "the loss is nan")
    assert Outcomes(plan).choice("base") == (True, 0.1)
    (folder / "result.json").unlink()
    assert Outcomes(plan).choice("base") == (False, None)
    assert list(Outcomes(plan).due()) == [(Job("base", 0.01, 0), False)]


def test_a_score_that_no_run_has_says_what_there_is(plan: Plan) -> None:
    plan.comparison.score = "test/avarage"
    outcomes = Outcomes(plan)
    reason = outcomes.failure(Job("base", 0.01, 0))
    assert reason == "its metrics hold no test/avarage; there are test/average, val_loss"


def test_seeds_that_are_fitted_but_not_tested_are_due_for_their_test(plan: Plan) -> None:
    write_result(plan.folder_of(Job("base", 0.01, 0)), "fitted")
    assert list(Outcomes(plan).due()) == [(Job("base", 0.01, 0), True)]


def test_an_outcome_is_what_the_files_of_a_job_say(plan: Plan) -> None:
    folder = plan.folder_of(Job("better", 0.01, 1))
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.status == "done"
    assert outcome.metrics == {"val_loss": 1.0, "test/average": 0.82}
    assert (outcome.start, outcome.end, outcome.adapter_bytes) == (200, 100, 123)
    assert (outcome.seconds_per_step, outcome.peak_memory_mb) == (1.25, 500.0)
    assert outcome.folder == folder / "version_0"
    assert read_outcome(folder / "nowhere") is None


def test_a_job_is_said_to_stand_as_it_does(plan: Plan) -> None:
    job = Job("base", 0.01, 0)
    assert Outcomes(plan).sentence(job) == "test/average 0.5000"
    assert Outcomes(plan).sentence(Job("base", 0.1, 0)) == "val_loss 2.0000"
    write_result(plan.folder_of(job), "failed", "the loss is nan")
    assert Outcomes(plan).sentence(job) == "failed: the loss is nan"
    assert Outcomes(plan).progress() == (12, 12)


def test_a_run_that_ends_outside_its_budget_is_said_to(plan: Plan) -> None:
    job = Job("base", 0.01, 0)  # 100 parameters train at its end
    for match in (None, Match(steps=3), Match(parameters=104), Match(parameters=2, leave=["base"])):
        plan.comparison.match = match
        assert Outcomes(plan).off_budget(job) == ""
    plan.comparison.match = Match(parameters=155_648)
    said = "100 parameters train at its end, outside 5% of match.parameters = 155,648"
    assert Outcomes(plan).off_budget(job) == said
    assert Outcomes(plan).sentence(job) == f"test/average 0.5000, but {said}"
    plan.comparison.match = Match(parameters=110, tolerance=0.01)
    assert "outside 1% of match.parameters = 110" in Outcomes(plan).off_budget(job)
    write_result(plan.folder_of(job), "failed", "the loss is nan")
    assert Outcomes(plan).off_budget(job) == ""


def test_a_count_that_no_record_holds_is_said_to_be_unknown(plan: Plan) -> None:
    job = Job("base", 0.01, 0)
    (plan.folder_of(job) / "version_0/run.json").unlink()
    plan.comparison.match = Match(parameters=100)
    assert Outcomes(plan).off_budget(job).endswith("at its end is not in its record")
