"""Checkpoints as files: written whole, and read only if they are what was written."""

from __future__ import annotations

import errno
import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from lightning_peft.atomic import write_atomically
from lightning_peft.errors import MissingFile, UserError

# Entries that every checkpoint of an adapted module has, and their types.
_ENTRIES: dict[str, type] = {"state_dict": dict, "adapter": dict, "global_step": int}
DIGEST = "digest"  # an entry of every file: of all others
_ADAPTER: dict[str, type] = {"strategy": str, "arguments": dict, "layers": list, "state": dict}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that a crash in the middle of writing cannot harm.

    Lightning's own writer goes through a temporary file that may lie on another file system, from
    where a move is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint beside its place and move it there."""

        def write(part: Path) -> None:
            sealed = {**checkpoint, DIGEST: digest_of(checkpoint)}
            # An open file: given a path, torch says of a full disk only "unexpected pos".
            with part.open("wb") as file:
                torch.save(sealed, file)

        write_atomically(path, write)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            MissingFile: If there is none.
            UserError: If it is cut off or damaged, or holds code.
        """
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, or say in one sentence why that fails.

    The archive's sums are compared first, which torch does not do: one flipped bit would go on as
    another weight; then the digest of what was written. Nothing that it holds is ever run.

    Args:
        path: The file.
        map_location: As in ``torch.load``.

    Returns:
        The checkpoint.

    Raises:
        MissingFile: If there is none.
        UserError: If it is cut off or damaged, or holds code.
    """
    if Path(path).is_dir():
        raise UserError(
            f"{path} is a folder of shards that another program wrote; checkpoints here are single "
            "files, under every engine."
        )
    if not Path(path).is_file():
        raise MissingFile(f"the checkpoint {path} does not exist.")
    try:
        _check_sums(Path(path))
        found = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk's, or about rights; a damaged index leads to an invalid place
        raise _unreadable(path, error) from error
    if not isinstance(found, dict):
        raise UserError(
            f"the checkpoint {path} holds a {type(found).__name__} and no checkpoint; "
            "give one that lightning-peft fit wrote."
        )
    written = found.pop(DIGEST, None)
    if written != digest_of(found) and (written is not None or "adapter" in found):
        raise UserError(
            f"the checkpoint {path} is cut off or damaged (it is not what was written); resume "
            "from the one before it."
        )
    return found


def _unreadable(path: str | Path, error: Exception) -> UserError:
    """Why torch does not read a file."""
    code = re.search(r"(?i)unsupported global:? (?:GLOBAL )?([\w.]+)", str(error))
    if code:
        return UserError(
            f"the checkpoint {path} holds code ({code[1]}), which is not run; lightning_peft "
            "writes tensors and plain values only, so another program wrote it."
        )
    reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
    return UserError(
        f"the checkpoint {path} is cut off or damaged ({reason}); resume from the one before it."
    )


def digest_of(content: Any) -> str:
    """A digest of tensors and plain values, however they are nested; BLAKE2b, 16 bytes, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, content: Any) -> None:
    if isinstance(content, Tensor):
        value = content.detach().cpu().contiguous().reshape(-1)
        digest.update(f"tensor {value.dtype} {list(content.shape)} ".encode())
        digest.update(value.view(torch.uint8).numpy())
    elif isinstance(content, dict):
        digest.update(f"dict {len(content)} ".encode())
        for key, value in content.items():
            _add(digest, key)
            _add(digest, value)
    elif isinstance(content, (list, tuple)):
        digest.update(f"list {len(content)} ".encode())
        for value in content:
            _add(digest, value)
    else:
        text = repr(content).encode("utf-8", "surrogatepass")
        digest.update(f"{type(content).__name__} {len(text)} ".encode() + text)


def _check_sums(path: Path) -> None:
    """Compare every record of the archive with the sum that was written beside it.

    Raises:
        ValueError: If one differs.
        BadZipFile, and others: If it is no archive.
    """
    if not zipfile.is_zipfile(path):
        return  # torch says what it is
    with zipfile.ZipFile(path) as archive:
        try:
            broken = archive.testzip()
        except zlib.error as error:
            raise ValueError(str(error)) from error
    if broken is not None:
        raise ValueError(f"the sum of {broken} differs")


def check_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Check that a checkpoint is one of an adapted module, and that training goes on from it.

    Args:
        checkpoint: As read.
        path: Its file, for the error.

    Returns:
        The checkpoint.

    Raises:
        UserError: If an entry is missing, or a tensor holds NaN or an infinite number.
    """
    saved = checkpoint.get("adapter")
    if saved is None:
        raise UserError(
            f"the checkpoint {path} was not written by lightning_peft: it has no entry 'adapter'."
        )
    for kind, entries, content in (("", _ENTRIES, checkpoint), ("adapter.", _ADAPTER, saved)):
        for name, cls in entries.items():
            found = content.get(name) if isinstance(content, dict) else None
            if not isinstance(found, cls):
                raise UserError(
                    f"the checkpoint {path} is not whole: its entry '{kind}{name}' is "
                    f"{'missing' if found is None else f'a {type(found).__name__}'}; resume from "
                    "the one before it."
                )
    for name, tensor in _tensors(checkpoint):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"the checkpoint {path} holds NaN or an infinite number in {name}: training had "
                "broken down before it was written; resume from the one before it."
            )
    return checkpoint


def _tensors(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What is trained, and the optimizers' moments, by name."""
    for name, value in checkpoint["state_dict"].items():
        if isinstance(value, Tensor):
            yield name, value
    for state in checkpoint.get("optimizer_states") or []:
        for index, entry in state.get("state", {}).items():
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if isinstance(value, Tensor):
                    yield f"optimizer_states.{index}.{key}", value


def step_of(path: Path) -> int:
    """The optimizer steps behind a checkpoint, by its name; -1 where that does not tell."""
    step = re.search(r"step=(\d+)", path.name)
    return int(step[1]) if step else -1
