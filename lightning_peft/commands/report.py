"""``lightning-peft report``: pictures and a page from a run's folder."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.commands.parsing import command_parser


def main(words: list[str]) -> None:
    """Draw and write the report of a run.

    Args:
        words: The command's options.
    """
    parser = command_parser(__name__, __doc__)
    parser.add_argument("folder", help="a run's folder, such as runs/quickstart/version_0")
    options = parser.parse_args(words)

    from lightning_peft.reports import report

    print(report(Path(options.folder)))
