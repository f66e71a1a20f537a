"""The studies on pretrained models, kept as one line a run, so that they can go on elsewhere.

    lightning-peft compare --config configs/compare/small_loradrop.yaml --data.task sst2 ...
    python benchmarks/pretrained.py pack runs/compare/small_loradrop small_loradrop_sst2
    python benchmarks/pretrained.py unpack small_loradrop_sst2 runs/compare/small_loradrop

``pack`` writes what a comparison has to ``benchmarks/results/pretrained/NAME.jsonl``: each run's
settings, record and tables, no weights. ``unpack`` makes its folders again, after which
``lightning-peft compare`` goes on with what is left, and ``--table_only true`` makes the tables and
pictures. Give data by a path that holds elsewhere too, such as a link ``data``: a comparison goes
on only with runs of its own settings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "results" / "pretrained"
TEXTS = ("metrics.csv", "importance.csv", "decisions.csv")


def packed(folder: Path) -> Iterator[dict[str, Any]]:
    """A line for each run of a comparison that has come to an end.

    Args:
        folder: The comparison's.
    """
    for path in sorted(folder.glob("runs/**/result.json")):
        run = path.parent
        versions = sorted(run.glob("version_*"))
        files = {
            name: (versions[-1] / name).read_text()
            for name in TEXTS
            if versions and (versions[-1] / name).is_file()
        }
        settings = yaml.safe_load((run / "settings.yaml").read_text())
        settings["trainer"]["default_root_dir"] = ""
        if versions and (versions[-1] / "run.json").is_file():
            record = json.loads((versions[-1] / "run.json").read_text())
            # Folders of this machine tell nothing elsewhere.
            record.pop("exported", None)
            record["model"] = settings["model"]["init_args"]["model_name_or_path"]
            files["run.json"] = json.dumps(record, indent=2) + "\n"
        yield {
            "run": str(run.relative_to(folder / "runs")),
            "result": json.loads(path.read_text()),
            "settings": settings,
            "files": files,
        }


def unpack(lines: list[dict[str, Any]], folder: Path) -> int:
    """Make the folders of runs again; those that are there stay.

    Args:
        lines: As :func:`packed` gives them.
        folder: The comparison's.

    Returns:
        How many were made.
    """
    made = 0
    for line in lines:
        run = folder / "runs" / line["run"]
        if (run / "result.json").exists():
            continue
        version = run / "version_0"
        version.mkdir(parents=True)
        for name, text in line["files"].items():
            (version / name).write_text(text)
        settings = line["settings"]
        settings["trainer"]["default_root_dir"] = str(run.absolute())
        (run / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        (run / "result.json").write_text(json.dumps(line["result"]) + "\n")
        made += 1
    return made


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument("first", help="pack: the comparison's folder; unpack: a name")
    parser.add_argument("second", help="pack: a name; unpack: the comparison's folder")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the packed file lies")
    given = parser.parse_args()
    if given.command == "pack":
        given.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(line) + "\n" for line in packed(Path(given.first))]
        (given.folder / f"{given.second}.jsonl").write_text("".join(lines))
        print(f"{len(lines)} runs packed")
    else:
        text = (given.folder / f"{given.first}.jsonl").read_text()
        count = unpack([json.loads(line) for line in text.splitlines()], Path(given.second))
        print(f"{count} runs unpacked")


if __name__ == "__main__":
    main()
