"""A disk that refuses a write is said by path and reason, and the run goes on when it gives way.

Every file that a command writes goes through ``lightning_peft.atomic``: here each of these writes
fails once, the first, the second, and so on. The same is done with a real file system of eight
megabytes where one can be mounted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from at_once import small_fit, write

from lightning_peft import atomic
from lightning_peft.cli import main
from lightning_peft.errors import naming

# A run that ends by an error tries to leave a picture, which may fail for the same reason.
pytestmark = pytest.mark.filterwarnings("ignore:importance.png was not drawn")


class Disk:
    """Counts writes, and refuses one of them."""

    def __init__(self) -> None:
        self.count, self.refused, self.number = 0, -1, errno.ENOSPC

    @contextlib.contextmanager
    def naming(self, path: Path) -> Iterator[None]:
        with naming(path):
            self.count += 1
            if self.count == self.refused:
                raise OSError(self.number, os.strerror(self.number))
            yield


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(atomic, "naming", made.naming)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    return made


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command: its exit status, and what it said of an error."""

    def run(*words: Any) -> tuple[int, str]:
        capfd.readouterr()
        try:
            main([str(word) for word in words])
        except SystemExit as error:
            return int(error.code or 0), capfd.readouterr().err
        return 0, capfd.readouterr().err

    return run


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith(".part")]


def refuse_each(
    base: Path, folder: Path, disk: Disk, command: Command, number: int, every: int
) -> None:
    """Refuse one write of a fit after another, each followed by the fit that goes on."""
    config = write(folder / "fit.yaml", small_fit(base, folder / "runs", max_steps=4))
    assert command("fit", "--config", config) == (0, "")
    expected, writes = adapter(folder / "runs" / "version_0"), disk.count
    assert writes > 10
    for refused in range(1, writes + 1, every):
        shutil.rmtree(folder / "runs")
        disk.count, disk.refused, disk.number = 0, refused, number
        code, said = command("fit", "--config", config)
        disk.refused = -1
        run = folder / "runs" / "version_0"
        if code:  # else it was a picture, whose failure is a warning
            assert code == 2
            assert f"{folder / 'runs'}" in said
            assert f": {os.strerror(number)}; " in said
        assert left_over(folder) == []
        resumes = run.exists() and any(run.glob("checkpoints/*.ckpt"))
        again = ["--ckpt_path", "last"] if resumes else ["--trainer.default_root_dir", run.parent]
        if run.exists() and not resumes:
            shutil.rmtree(run)
        assert command("fit", "--config", config, *again) == (0, ""), refused
        assert adapter(run) == expected, refused


def test_a_disk_that_refuses_some_writes_costs_no_run(
    base: Path, tmp_path: Path, disk: Disk, command: Command
) -> None:
    refuse_each(base, tmp_path, disk, command, errno.ENOSPC, every=9)


@pytest.mark.long
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_any_write_costs_no_run(
    base: Path, tmp_path: Path, disk: Disk, command: Command, number: int
) -> None:
    refuse_each(base, tmp_path, disk, command, number, every=1)


@pytest.mark.slow
def test_commands_on_a_run_say_what_the_disk_refused_and_go_on(
    base: Path, tmp_path: Path, disk: Disk, command: Command
) -> None:
    """Test, predict, export and report leave the run as it was, and end as if nothing had been."""
    config = write(tmp_path / "fit.yaml", small_fit(base, tmp_path / "runs", max_steps=4))
    assert command("fit", "--config", config)[0] == 0
    run = tmp_path / "runs" / "version_0"
    before = adapter(run)
    last, out = ["--config", config, "--ckpt_path", "last"], tmp_path / "out"
    for words in (
        ["test", *last],
        ["predict", *last],
        ["export", "--ckpt_path", run, "--output", out],
        ["export", "--ckpt_path", run, "--output", tmp_path / "merged", "--merge"],
        ["report", run],
    ):
        disk.count = 0
        assert command(*words)[0] == 0, words
        writes = disk.count
        assert writes, words
        for refused in range(1, writes + 1):
            for folder in (out, tmp_path / "merged"):
                shutil.rmtree(folder, ignore_errors=True)
            disk.count, disk.refused = 0, refused
            code, said = command(*words)
            disk.refused = -1
            assert code == 2, (words, refused)
            assert "No space left on device; free some space" in said, (words, refused)
            assert left_over(tmp_path) == []
            assert not out.exists(), refused
            assert command(*words)[0] == 0, (words, refused)
    assert adapter(run) == before


SMALL_DISK = """
import os, shutil, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", sys.argv[1]], check=True)
from lightning_peft.cli import main
disk, config = Path(sys.argv[1]), sys.argv[2]

def command(*words):
    sys.argv = ["lightning-peft"]
    try:
        main([str(word) for word in words])
    except SystemExit as error:
        return error.code
    return 0

assert command("fit", "--config", config) == 0
run = disk / "runs" / "version_0"
read = lambda: (run / "adapter" / "adapter_model.safetensors").read_bytes()
expected, used = read(), sum(p.stat().st_size for p in disk.rglob("*") if p.is_file())
codes = []
for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
    shutil.rmtree(disk / "runs")
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(free - int(share * used)))
    codes.append(command("fit", "--config", config))
    ballast.unlink()
    resumes = any(run.glob("checkpoints/*.ckpt"))
    if not resumes:
        shutil.rmtree(disk / "runs", ignore_errors=True)
    assert command("fit", "--config", config, *(["--ckpt_path", "last"] if resumes else [])) == 0
    assert read() == expected, share
print("codes", codes)
"""


@pytest.mark.slow
def test_a_disk_of_eight_megabytes_costs_no_run(base: Path, tmp_path: Path) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    (tmp_path / "disk").mkdir()
    try:
        can = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")]
        subprocess.run([*alone, *can], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    root = tmp_path / "disk" / "runs"
    config = write(tmp_path / "fit.yaml", small_fit(base, root, max_steps=4))
    program = [
        sys.executable,
        "-c",
        SMALL_DISK,
        tmp_path / "disk",
        config,
        Path(__file__).parents[2],
    ]
    done = subprocess.run(
        [*alone, *map(str, program)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "codes [2, 2, " in done.stdout
    assert done.stderr.count("No space left on device; free some space") >= 3
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("make", [Path.touch, lambda root: root.symlink_to(root)])
def test_a_root_that_is_no_folder_is_one_sentence(
    base: Path, tmp_path: Path, disk: Disk, command: Command, make: Callable[[Path], None]
) -> None:
    root = tmp_path / "root"
    make(root)
    config = write(tmp_path / "fit.yaml", small_fit(base, root))
    code, said = command("fit", "--config", config)
    assert (code, said.count("\n")) == (2, 1)
    assert f"error: {root}" in said
    assert "a file stands where a folder should be; give another folder." in said


@pytest.mark.parametrize("name", ["a" * 300, "/".join(["long"] * 1000)])
def test_a_name_that_is_too_long_is_one_sentence(
    base: Path, tmp_path: Path, disk: Disk, command: Command, name: str
) -> None:
    config = write(tmp_path / "fit.yaml", small_fit(base, tmp_path / name))
    code, said = command("fit", "--config", config)
    assert (code, said.count("\n")) == (2, 1)
    assert "File name too long; give a shorter name." in said


def test_a_folder_that_is_removed_during_the_run_is_said(
    base: Path, tmp_path: Path, disk: Disk, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_peft.modules import CausalLMModule

    hook = CausalLMModule.on_before_optimizer_step

    def remove(self: Any, optimizer: Any) -> None:
        if self.trainer.global_step == 3:
            shutil.rmtree(tmp_path / "runs")
        hook(self, optimizer)

    monkeypatch.setattr(CausalLMModule, "on_before_optimizer_step", remove)
    config = write(tmp_path / "fit.yaml", small_fit(base, tmp_path / "runs"))
    code, said = command("fit", "--config", config)
    assert code == 2
    assert "metrics.csv: No such file or directory; it is not there, or was removed" in said
