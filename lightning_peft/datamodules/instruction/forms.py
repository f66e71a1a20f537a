"""The forms in which people keep instructions, told by their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.datamodules.loading.fields import filled, listed, text_in
from lightning_peft.errors import UserError

Record = dict[str, Any]

# In the order in which they are looked for.
FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
TEXTS = ("instruction", "input", "output", "prompt", "completion", "text")
FIELDS = ("messages", "conversations", *TEXTS)


def of_one_form(
    records: Sequence[Record], place: str, columns: Mapping[str, str]
) -> tuple[str, list[Record]]:
    """Tell the form that all records have.

    Args:
        records: At least one.
        place: Names them in errors.
        columns: Names of fields in the records by those in `FIELDS`.

    Returns:
        The form's name, and the records with its names of fields.

    Raises:
        UserError: If the records have no known form, or not all the same.
    """
    for field, column in columns.items():
        if column not in records[0]:
            raise UserError(
                f"data.columns.{field} is {column!r}, but {place} has the fields "
                f"{listed(records[0])}."
            )
    renamed = [
        {**record, **{field: record.get(column) for field, column in columns.items()}}
        for record in records
    ]
    form = _form(renamed[0])
    if form is None:
        wanted = "; ".join(" and ".join(fields) for fields in FORMS.values())
        raise UserError(
            f"{place} has the fields {_fields(renamed[0])}, but wanted are {wanted}; "
            "data.columns maps the names."
        )
    for number, record in enumerate(renamed, start=1):
        other = _form(record)
        if other != form:
            what = f"is in the {other} form" if other else f"holds only {_fields(record)}"
            raise UserError(
                f"Record {number} of {place} {what}, but the first one is in the {form} form."
            )
    return form, renamed


def texts_of(form: str, record: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the texts of a record in a form; anything else in their place is refused."""
    fields = [field for field in (*FORMS[form], "input") if field in TEXTS]
    return {f: text_in(record, f, name) for f in fields if record.get(f) is not None}


def _form(record: Mapping[str, Any]) -> str | None:
    there = {field for field, value in record.items() if value is not None}
    return next((form for form, fields in FORMS.items() if there.issuperset(fields)), None)


def _fields(record: Mapping[str, Any]) -> str:
    return filled(record) or "(all empty)"
