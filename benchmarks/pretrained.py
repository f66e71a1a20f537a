"""The studies on pretrained models, kept as one line a run, so that they can go on elsewhere.

    lightning-peft compare --config configs/compare/small_loradrop.yaml --data.task sst2 ...
    python benchmarks/pretrained.py pack runs/compare/small_loradrop small_loradrop_sst2
    python benchmarks/pretrained.py unpack small_loradrop_sst2 runs/compare/small_loradrop
    python benchmarks/pretrained.py tables

``pack`` writes what a comparison has to ``benchmarks/results/pretrained/NAME.jsonl``: each run's
settings, record and tables, no weights. ``unpack`` makes its folders again, after which
``lightning-peft compare`` goes on with what is left. ``tables`` writes the tables and pictures of
all that is packed into ``docs/pretrained.md`` and the README. Give data by a path that holds
elsewhere too, such as a link ``data``: a comparison goes on only with runs of its own settings.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pretrained"
TEXTS = ("metrics.csv", "importance.csv", "decisions.csv")
# Each study's comparison, and what its command adds.
STUDIES: dict[str, tuple[str, ...]] = {
    "small_loradrop_sst2": ("small_loradrop", "--data.task", "sst2"),
    "small_rank_family_sst2": ("small_rank_family", "--data.task", "sst2"),
    "small_loradrop_threshold_sst2": ("small_loradrop_threshold", "--data.task", "sst2"),
    "small_e2e": ("small_e2e",),
    "small_sst2": ("small_sst2",),
}
FEWEST = 5  # seeds, below which nothing is told apart
PICTURES = (
    "score_by_seed.png",
    "importance_by_layer.png",
    "rank_by_layer.png",
    "rank_over_steps.png",
)


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


def judge(name: str, folder: Path) -> None:
    """Have ``lightning-peft compare`` write the tables and pictures of a packed study.

    Args:
        name: The study's.
        folder: An empty one, for its runs.
    """
    from lightning_peft.commands.compare import main as compare

    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    unpack([json.loads(line) for line in lines], folder)
    config, *words = STUDIES[name]
    words += ["--config", str(ROOT / "configs" / "compare" / f"{config}.yaml")]
    words += ["--data.data_dir", "data", "--folder", str(folder), "--table_only", "true"]
    with contextlib.redirect_stdout(io.StringIO()):
        compare(words)


def short_table(results: str) -> str:
    """The columns of a ``results.csv`` that tell most, of rows that have five seeds.

    Args:
        results: The file's text.
    """
    lines = ["| run | test loss (95 %) | difference, paired over seeds | parameters |"]
    lines.append("|---|---|---|---|")
    for row in csv.DictReader(io.StringIO(results)):
        if int(row["seeds"]) < FEWEST or row["score"] != "test/loss":
            continue
        loss, low, high = (float(row[key]) for key in ("mean", "low", "high"))
        gap = ""
        if row["difference"]:
            keys = ("difference", "difference_low", "difference_high")
            gap = "{:+.3f} ({:+.3f} to {:+.3f})".format(*(float(row[key]) for key in keys))
            gap += ", inside the noise" if row["inside_noise"] == "true" else ""
        count = f"{int(row['parameters_end']):,}"
        lines.append(f"| {row['run']} | {loss:.3f} ({low:.3f} to {high:.3f}) | {gap} | {count} |")
    return "\n".join(lines)


def insert(page: Path, name: str, text: str) -> None:
    """Put a text between a page's marks ``<!-- NAME -->`` and ``<!-- /NAME -->``, if it has them.

    Args:
        page: A Markdown file.
        name: Of the marks.
        text: What is to stand there.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.read_text().partition(begin)
    if found:
        page.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{rest.partition(end)[2]}")


def write_tables() -> None:
    """Write the tables and pictures of every study that has been packed."""
    for name in STUDIES:
        if not (RESULTS / f"{name}.jsonl").is_file():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            judge(name, folder)
            tables = (folder / "results.md").read_text()
            insert(ROOT / "docs" / "pretrained.md", name, tables)
            insert(ROOT / "README.md", name, short_table((folder / "results.csv").read_text()))
            for picture in PICTURES:
                if (folder / picture).is_file():
                    shutil.copy(folder / picture, ROOT / "docs" / "images" / f"{name}_{picture}")
        print(name)


def main() -> None:
    """Pack, unpack, or write tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("pack", "unpack", "tables"))
    parser.add_argument("first", nargs="?", help="pack: the comparison's folder; unpack: a name")
    parser.add_argument("second", nargs="?", help="pack: a name; unpack: the comparison's folder")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the packed file lies")
    given = parser.parse_args()
    if given.command == "tables":
        write_tables()
    elif given.second is None:
        parser.error(f"{given.command} takes two words.")
    elif given.command == "pack":
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
