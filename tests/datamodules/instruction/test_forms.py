"""The form of records is told by their fields."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_peft.datamodules.instruction.forms import FORMS, of_one_form, texts_of


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_told_by_its_fields(form: str) -> None:
    records = [{field: "a" for field in FORMS[form]}]
    found, same = of_one_form(records, "here", {})
    assert found == form
    assert same == records


def test_columns_take_the_place_of_fields() -> None:
    records: list[dict[str, Any]] = [{"q": "a", "a": "b", "text": "c"}]
    form, renamed = of_one_form(records, "here", {"instruction": "q", "output": "a"})
    assert form == "instruction"
    assert (renamed[0]["instruction"], renamed[0]["output"]) == ("a", "b")


@pytest.mark.parametrize(
    ("records", "columns", "message"),
    [
        ([{"x": 1}], {}, "here has the fields x, but wanted are messages; "),
        ([{"text": "a"}], {"text": "t"}, "data.columns.text is 't', but here has the fields text."),
        (
            [{"text": "a"}, {"prompt": "a", "completion": "b"}],
            {},
            "Record 2 of here is in the prompt form, but the first one is in the text form.",
        ),
    ],
)
def test_records_of_no_or_several_forms_are_refused(
    records: list[dict[str, Any]], columns: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        of_one_form(records, "here", columns)


def test_texts_of_a_record_are_texts() -> None:
    record = {"instruction": "Add", "input": "1", "output": "2"}
    assert texts_of("instruction", record, "Record 1") == record
    with pytest.raises(ValueError, match="^Record 1 has no text in 'output' but a list"):
        texts_of("instruction", {"instruction": "Add", "output": ["2"]}, "Record 1")
